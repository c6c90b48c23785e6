"""Knowledge of diseases in a text tower: texts of one node of the disease tree lie together, those of others apart."""

from dermray.train.objectives.kinds import ObjectiveKind
from dermray.train.objectives.knowledge.nodes import some_of_each_node
from dermray.train.objectives.knowledge.settings import KnowledgeConfig

# It has no images, so nothing of it is validated.
OBJECTIVE = ObjectiveKind(KnowledgeConfig, "dermray.train.objectives.knowledge.module", counts=some_of_each_node)
