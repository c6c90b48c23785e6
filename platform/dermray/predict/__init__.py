"""What a model says of an image: classes by their names, concepts, the disease tree; and which model is served."""

from dermray.predict.classifier import ClassifierCache, RankedClass, TooManyBuildsError, num_prompts, rank
from dermray.predict.concepts import ConceptScore, concept_names, encode_concepts, score_concepts
from dermray.predict.hierarchy import RankedNode, roll_up
from dermray.predict.model import ModelSource, ServedModel, locate, served_model

__all__ = [
    "ClassifierCache",
    "ConceptScore",
    "ModelSource",
    "RankedClass",
    "RankedNode",
    "ServedModel",
    "TooManyBuildsError",
    "concept_names",
    "encode_concepts",
    "locate",
    "num_prompts",
    "rank",
    "roll_up",
    "score_concepts",
    "served_model",
]
