"""The Open Inference Protocol v2 over the same engine: `codec` is its bytes, `routes` its routes."""

from service.web.open_inference.routes import create_router

__all__ = ["create_router"]
