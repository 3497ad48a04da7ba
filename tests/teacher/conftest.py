from tests.engines import engine_environment

__all__ = ["engine_environment"]
