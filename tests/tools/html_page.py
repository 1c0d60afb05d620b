"""A page for a browser, taken apart: its tags close in order, and nothing is fetched from elsewhere."""

from html.parser import HTMLParser

_EMPTY = ("img", "meta")


class Page(HTMLParser):
    """Tags that are still open, what a browser would fetch, pictures, rows, charts, text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []  # a picture within the page is not
        self.pictures: list[str] = []
        self.rows: list[int] = []  # cells of every row
        self.charts: dict[str, str] = {}  # title -> what it shows, in words
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        places = [said[name] for name in ("src", "href", "srcset", "data") if name in said]
        self.fetched += [place for place in places if not place.startswith("data:")]
        if tag == "img":
            self.pictures.append(said["src"])
        if tag == "svg":
            self.charts[said["aria-label"].partition(" over steps")[0]] = said["aria-label"]
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(said.get("colspan") or 1)
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
