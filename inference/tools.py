"""A model that uses a tool: what it writes between <|python_start|> and <|python_end|> is worked out for it.

One `ToolUse` watches the tokens of one row. When a call is complete and has an answer, that row's next tokens are
forced: <|output_start|>, the answer, <|output_end|>. They are the tool's words and not the model's; events mark them as
forced, and training from such rows leaves them out.
"""

from collections import deque
from collections.abc import Callable

from data.tokenizer import Tokenizer

Tool = Callable[[str], str | None]  # an expression → the answer, or None: no reply


class ToolUse:
    """The state machine of one row: outside of a call, inside one, or with words to be forced."""

    def __init__(self, tokenizer: Tokenizer, tool: Tool) -> None:
        self.tokenizer, self.tool = tokenizer, tool
        self.start, self.end, self.output_start, self.output_end = (
            tokenizer.encode_special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end")
        )
        self.call: list[int] | None = None  # what was said in the call so far; None: no call is open
        self.forced: deque[int] = deque()  # what the row must say next

    @property
    def next_forced(self) -> int | None:
        return self.forced[0] if self.forced else None

    def push(self, token: int) -> bool:
        """Take note of a token that the row said → whether it was forced."""
        if self.forced:
            expected = self.forced.popleft()
            assert token == expected, "a forced token was not said"
            return True
        if token == self.start:  # a second start begins anew
            self.call = []
        elif token == self.end and self.call is not None:
            self.answer(self.call)
            self.call = None
        elif self.call is not None:
            self.call.append(token)
        return False

    def answer(self, call: list[int]) -> None:
        answer = self.tool(self.tokenizer.decode(call)) if call else None
        if answer is not None:
            self.forced.extend([self.output_start, *self.tokenizer.encode(answer), self.output_end])
