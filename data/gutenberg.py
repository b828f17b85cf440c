"""Taking Project Gutenberg's own words off a book: the header before it, and the end mark and licence after it.

Thirty years of files begin and end in many ways: `*** START OF THE PROJECT GUTENBERG EBOOK …`, `*END*THE SMALL PRINT`,
`End of Project Gutenberg's …`. A mark counts only where headers and footers are, so that a text without them, or a
character who mentions one, stays whole.
"""

import re

MAX_HEADER = 60_000  # characters; the longest small print of the nineties has some 15,000
MAX_FOOTER = 60_000

START = re.compile(
    r"^\*{1,4}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*(?:\n(?!\s*\n)[^\n]*\*\*\*)?[^\n]*\n"
    r"|^\*?[^\n]*END[ *]*THE SMALL PRINT[^\n]*\n"
    r"|^[ \t]*(?:The )?Project Gutenberg(?:'s|’s)? (?:Etext|EBook) (?:of|,)[^\n]*\n",
    re.IGNORECASE | re.MULTILINE,
)
END = re.compile(
    r"^[ \t]*\*{1,4}[ \t]*END OF (?:THE|THIS) PROJECT GUTENBERG"
    r"|^[ \t]*(?:This is )?(?:the )?end of (?:the |this )?project gutenberg"
    r"|^\*{0,4}START: FULL LICENSE",
    re.IGNORECASE | re.MULTILINE,
)
CREDITS = re.compile(
    r"\A\s*(?:(?:this )?e-?text (?:was )?)?(?:prepared|produced) by[^\n]*(?:\n[^\n]+)*\n", re.IGNORECASE
)


def strip_gutenberg(text: str) -> str:
    """The book alone; a text without Gutenberg's marks comes back as it is."""
    if end := END.search(text, max(0, len(text) - MAX_FOOTER)):
        text = text[: end.start()].rstrip() + "\n"
    begins = 0
    while begin := START.search(text, begins, min(len(text), MAX_HEADER)):
        begins = begin.end()
    return CREDITS.sub("", text[begins:], count=1).lstrip("\n") if begins else text
