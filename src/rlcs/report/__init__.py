"""The report of a run: one self-contained HTML file that needs no server.

`load_run` reads a run folder, `findings` computes the figures, `charts` draws them, and `page` fills
the template. Parts that a run does not have are left out of its page.
"""

from rlcs.report.page import build

__all__ = ["build"]
