"""The endpoints that ask a model, a file each: route, fields and answer; who adds one names its router here."""

from dermray.service.http.endpoints import classify, concepts, embeddings, predict, search

# In the order of the OpenAPI document.
ROUTERS = (embeddings.router, classify.router, concepts.router, predict.router, search.router)

__all__ = ["ROUTERS"]
