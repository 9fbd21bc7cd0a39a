"""LitServe, its port and settings as arguments. The JPEG is the body itself: as JSON or as a form it is slower."""

import json
import sys
from typing import Annotated, Any

import litserve
from fastapi import Body
from photos import Photos


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.photos = Photos()

    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, images: bytes | list[bytes]) -> Any:
        return self.photos(images) if isinstance(images, list) else self.photos([images])[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"scores": output}


if __name__ == "__main__":
    port, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    server = litserve.LitServer(
        Api(max_batch_size=settings["batch"], batch_timeout=0.001 if settings["batch"] > 1 else 0.0),
        accelerator="cpu",
        workers_per_device=settings["workers"],
        fast_queue=settings["fast"],
    )
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=settings["servers"],
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
