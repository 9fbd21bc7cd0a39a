"""A service that sees each image in several views: what that changes, and what it says of it."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from service.settings import Settings, SettingsError
from service.web.app import create_app
from tests.fakes import Letters, MeanColour, tiny_artifact, tiny_text_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused


def framed() -> bytes:
    """Red in a blue frame that takes more room than it: a matter of where one looks."""
    image = Image.new("RGB", (16, 16), (0, 0, 255))
    image.paste((255, 0, 0), (3, 3, 13, 13))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def said(client: httpx.Client) -> str:
    client.put("/v1/tasks/t", files=colours("red", "blue")).raise_for_status()
    answer = client.post("/v1/tasks/t/classify", files=[("image", framed())])
    return str(answer.raise_for_status().json()["predictions"][0]["label"])


@pytest.mark.slow
def test_with_two_views_the_middle_of_an_image_counts_too(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    for views, label in ((1, "blue"), (2, "red"), (3, "red")):
        settings = Settings(data_dir=tmp_path / str(views), views=views)
        with served(create_app(settings, artifact=artifact, extractor=MeanColour())) as client:
            assert said(client) == label
            assert client.get("/v1/artifact").json()["views"] == views


@pytest.mark.slow
def test_no_file_is_handed_out_that_would_see_less_than_the_service(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", views=2)
    with served(create_app(settings, artifact=tiny_artifact(tmp_path), extractor=MeanColour())) as client:
        said(client)
        problem = refused(client.get("/v1/tasks/t/export"), 409, "export_refused")
        assert "sees one view of an image, and this service 2" in problem["detail"]


def test_texts_have_no_views(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="FEWSHOT_VIEWS is for images"):
        create_app(Settings(views=2), artifact=tiny_text_artifact(tmp_path), extractor=Letters())
