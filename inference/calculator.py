"""Arithmetic in a string, worked out by walking its syntax tree: nothing is ever evaluated by Python itself.

Numbers, + − * / // % ** and brackets, and for words "strawberry".count("r"): what nanochat's calculator understands.
Everything has a bound (length, depth, size of numbers and powers), so an answer takes microseconds in any thread and no
timer is needed. Whatever is not understood, or has no answer, is None: a model that says nonsense gets no reply.
"""

import ast
import math
import operator

MAX_CHARS = 500  # of an expression
MAX_DIGITS = 400  # of a number on the way
MAX_BITS = MAX_DIGITS * math.log2(10)
MAX_DEPTH = 40  # of brackets and signs

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
Value = int | float | str


class NoAnswer(Exception):
    """Not understood, not allowed, or not defined."""


def calculate(expression: str) -> str | None:
    """The value of an expression as text: calculate("2 + 3*4") == "14"; None if it has none.

    Commas in numbers ("1,000") are read as such; those inside quotes are left alone.
    """
    try:
        return show(value_of(parse(expression), MAX_DEPTH))
    except (NoAnswer, ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def parse(expression: str) -> ast.expr:
    expression = expression.strip()
    if not expression or len(expression) > MAX_CHARS or "\n" in expression or "\0" in expression:
        raise NoAnswer
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    return ast.parse(expression, mode="eval").body


def value_of(node: ast.expr, depth: int) -> Value:
    """What a node is worth; only what is listed here has a worth."""
    if depth == 0:
        raise NoAnswer
    match node:
        case ast.Constant(value=bool()):
            raise NoAnswer
        case ast.Constant(value=int() | float() | str() as value):
            return bounded(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = number(operand, depth)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return power(number(left, depth), number(right, depth))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return bounded(OPERATORS[type(op)](number(left, depth), number(right, depth)))
        case ast.Call(func=ast.Attribute(value=text, attr="count"), args=[what], keywords=[]):
            text, what = value_of(text, depth - 1), value_of(what, depth - 1)
            if isinstance(text, str) and isinstance(what, str):
                return text.count(what)
    raise NoAnswer


def number(node: ast.expr, depth: int) -> int | float:
    value = value_of(node, depth - 1)
    if isinstance(value, str):
        raise NoAnswer
    return value


def power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent, refused before it is computed if it would be huge or complex."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if abs(exponent) * math.log2(abs(base)) > MAX_BITS:
            raise NoAnswer
    elif base < 0 and exponent != int(exponent):
        raise NoAnswer
    return bounded(base**exponent)


def bounded(value: Value) -> Value:
    """The value, unless it is no number or has too many digits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise NoAnswer
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise NoAnswer
    return value


def show(value: Value) -> str:
    """As Python prints it, which is what such models were taught."""
    if isinstance(value, str):
        raise NoAnswer
    return str(value)
