"""MLServer. The JPEG comes as base64 in JSON, the only binary form that its HTTP side reads."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mlserver import MLModel, types
from mlserver.codecs import Base64Codec, NumpyCodec
from photos import Photos


class Model(MLModel):
    async def load(self) -> bool:
        self.photos = Photos()
        threads = self.settings.parameters.extra["threads"]
        self.pool = ThreadPoolExecutor(threads) if threads else None  # without one, the model's process does it
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        images = Base64Codec.decode_input(payload.inputs[0])
        if self.pool:
            scores = await asyncio.get_running_loop().run_in_executor(self.pool, self.photos, images)
        else:
            scores = self.photos(images)
        output = NumpyCodec.encode_output("scores", np.array(scores, np.float32))
        return types.InferenceResponse(model_name=self.name, outputs=[output])
