"""From a run to people: a Hugging Face folder, an honest card, and the hub."""

from rlcs.publish.export import DTYPES, Export, export

__all__ = ["DTYPES", "Export", "export"]
