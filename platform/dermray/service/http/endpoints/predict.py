"""`/v1/predict`: what a model whose kind predicts says of one image."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermray.service.engine.verbs.predict import PREDICT, Predicted
from dermray.service.fleet.catalogue import Served
from dermray.service.http.asking import ImageEndpoint
from dermray.service.http.schemas import EXAMPLE_IMAGE, ImageRequest, ModelIdentity


class PredictRequest(ImageRequest):
    """One image for a model that predicts by itself."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": EXAMPLE_IMAGE}]})


class PredictResponse(BaseModel):
    """What a model of a kind that predicts says of one image."""

    object: Literal["prediction"] = "prediction"
    prediction: dict[str, Any] = Field(description="numbers, or nested lists of them, by name; the model's kind says")
    model: str
    model_info: ModelIdentity


def _content(said: Predicted, served: Served) -> dict[str, Any]:
    return {"object": "prediction", "prediction": {name: values.tolist() for name, values in said.values.items()}}


router = ImageEndpoint(
    name="predict",
    summary="What a model predicts of one image by itself",
    description="Of models whose kind predicts; what each array means, the kind says. JSON with a data URI, or "
    "multipart.",
    verb=PREDICT,
    request=PredictRequest,
    response=PredictResponse,
    question=lambda body, served, limits: (),
    content=_content,
).router()
