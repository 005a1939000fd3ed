"""One self-contained HTML page of a folder of results: no network, no fonts or scripts from elsewhere.

``tables.py`` says what the tables show, ``markup.py`` turns it into HTML, ``page.css`` and ``page.js`` are put into the page as
they are. Without JavaScript everything can be read; with it, tables sort and filter.
"""

from __future__ import annotations

from .page import page

__all__ = ["page"]
