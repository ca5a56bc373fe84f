"""The page at the end of a run: one self-contained HTML file that needs no server.

`gather` reads a run folder, `findings` turns it into plain figures, `charts` draws them, and
`page` puts everything into the template. What a run lacks is left out of its page.
"""

from rlcs.report.page import build

__all__ = ["build"]
