"""Reading a pickle as data: nothing it names is imported, nothing it calls is called.

A pickle is a program for a machine with a stack and a memo. Most of its instructions push numbers, strings, tuples, lists
and dicts; four of them reach outside, and those are why a pickle from a stranger must never meet `pickle.load`:

    GLOBAL, STACK_GLOBAL   push the class or function `module.name`      -> here a `Global` that only knows its name
    REDUCE, NEWOBJ         call what is on the stack                     -> here a `Record` that keeps name and arguments
    BUILD                  hand a state to `__setstate__`                -> here the state is kept beside the arguments

So `os.system("rm")` reads as `Record("os.system", ("rm",))`, an `argparse.Namespace` as a record whose `vars()` are its
attributes, and an enum as a record with its value as only argument. This file is a whole interpreter of the instructions
that pickle protocols 2 to 5 write (`pickletools` documents each); it does not use the `pickle` module. That also spares
what its C implementation does to hostile or torn files: it takes gigabytes for a memo index with a flipped bit, and
ends the process with a segmentation fault when a deeply nested tuple becomes a key. Here memory grows with the
length of the file only, no step is recursive, and every mistake is a `Malformed`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from checkpoints_conversion.files.dtypes import SAFETENSORS_NAMES

PERSISTENT = "<persistent>"
"""Name of the record that stands for an object outside the pickle; its arguments are what identifies it."""
MAX_NAME = 1000
MAX_KEY_LENGTH = 16
"""A tuple that is a key holds no more than this, and no tuples: hashing what a pickle builds can take forever."""


class Malformed(ValueError):
    """A file does not follow its format. The message says what, without the path, which the caller knows."""


class Global:
    """A class or function that a pickle names, by its dotted name only."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Global({self.name!r})"


class Record:
    """What a pickle wanted built: the name of the class or function, the arguments, the state that followed.

    A state that is a dict of attributes, as most classes have, can be read with `vars(record)`; any other state is in
    `state`. What was appended or assigned to the object (subclasses of list and dict) is in `items`.
    """

    __slots__ = ("__dict__", "args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"Record({self.name!r})"


def read_pickle(data: bytes) -> Any:
    """The object in `data`, of plain values, `Global` and `Record`. Torch dtypes are safetensors' names ("BF16").

    Raises:
        Malformed: not a pickle of protocol 2 to 5, torn, or more than such files contain.
    """
    machine = _Machine(data)
    try:
        while not machine.done:
            opcode = data[machine.at]
            machine.at += 1
            _OPCODES[opcode](machine)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        what = str(error) if isinstance(error, Malformed) else "not the pickle that torch writes"
        raise Malformed(f"{what} (byte {machine.at} of a pickle of {len(data)})") from None
    if len(machine.stack) != 1 or machine.marked:
        raise Malformed("a pickle that leaves its stack unfinished")
    return machine.stack[0]


class _Machine:
    """Stack, memo and position. `marked` holds the stacks that a MARK put aside."""

    __slots__ = ("at", "data", "done", "globals", "marked", "memo", "stack")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.done = False
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Any] = {}

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        stop = self.at + length
        if stop > len(self.data):
            raise Malformed("torn")
        taken = self.data[self.at : stop]
        self.at = stop
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        stop = self.data.index(b"\n", self.at, self.at + MAX_NAME)
        return self.take(stop + 1 - self.at)[:-1].decode()

    def since_mark(self) -> list[Any]:
        """What was pushed since the last MARK; the stack before it comes back."""
        taken = self.stack
        self.stack = self.marked.pop()
        return taken

    def push_global(self, module: Any, name: Any) -> None:
        dotted = f"{_text(module)}.{_text(name)}"
        if dotted not in self.globals:
            dtype = SAFETENSORS_NAMES.get(name) if module == "torch" else None
            self.globals[dotted] = dtype or Global(dotted)
        self.stack.append(self.globals[dotted])


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_NAME:
        raise Malformed("a name that is no name")
    return value


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise Malformed("arguments that are no tuple")
    return value


def _called(callee: Any, args: tuple[Any, ...]) -> Any:
    """What a call stands for; the two builders of plain data give plain data."""
    if type(callee) is not Global:
        raise Malformed("a call of what is no function")
    if callee.name == "torch.Size" and len(args) == 1:
        return _tuple(args[0])
    if callee.name == "collections.OrderedDict" and not args:
        return {}
    return Record(callee.name, args)


def _reduce(m: _Machine) -> None:
    args = _tuple(m.stack.pop())
    m.stack[-1] = _called(m.stack[-1], args)


def _new_with_keywords(m: _Machine) -> None:
    keywords = m.stack.pop()
    args = _tuple(m.stack.pop())
    m.stack[-1] = _called(m.stack[-1], args)
    _build(m.stack[-1], keywords)


def _build(target: Any, state: Any) -> None:
    if type(target) is dict:
        return  # attributes of an OrderedDict
    if type(target) is not Record:
        raise Malformed("a state for what has none")
    target.state = state
    if type(state) is dict:
        target.__dict__ = state  # not a copy: a small pickle could ask for many of a large one


def _assign(target: Any, pairs: list[Any]) -> None:
    if len(pairs) % 2:
        raise Malformed("a key without a value")
    keys, values = pairs[::2], pairs[1::2]
    if type(target) is dict:
        target.update(zip(map(_key, keys), values, strict=True))
    elif type(target) is Record:
        target.items.extend(zip(keys, values, strict=True))
    else:
        raise Malformed("a key for what has none")


def _key(value: Any) -> Any:
    if type(value) is tuple and len(value) <= MAX_KEY_LENGTH and tuple not in map(type, value):
        return value
    if type(value) is tuple:
        raise Malformed("a key that is too long")
    return value


def _extend(target: Any, values: Iterable[Any]) -> None:
    if type(target) is set:
        target.update(map(_key, values))
    elif type(target) is list:
        target.extend(values)
    elif type(target) is Record:
        target.items.extend(values)
    else:
        raise Malformed("items for what has none")


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(m: _Machine) -> None:
        if len(m.stack) < count:
            raise Malformed("too little on the stack")
        m.stack[len(m.stack) - count :] = [tuple(m.stack[-count:])]

    return make


def _mark(m: _Machine) -> None:
    m.marked.append(m.stack)
    m.stack = []


def _on_pair(act: Callable[[Any, Any], None]) -> Callable[[_Machine], None]:
    """Pop a value and act on what lies under it."""

    def run(m: _Machine) -> None:
        value = m.stack.pop()
        act(m.stack[-1], value)

    return run


def _on_marked(act: Callable[[Any, list[Any]], None]) -> Callable[[_Machine], None]:
    """Pop down to the mark and act on what lies under it."""

    def run(m: _Machine) -> None:
        values = m.since_mark()
        act(m.stack[-1], values)

    return run


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def run(m: _Machine) -> None:
        made = make(m)  # first: it may put another stack in place
        m.stack.append(made)

    return run


def _dict_since_mark(m: _Machine) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _assign(made, m.since_mark())
    return made


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _assign(m.stack[-1], [key, value])


def _persistent(m: _Machine) -> None:
    m.stack[-1] = Record(PERSISTENT, _tuple(m.stack[-1]))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push_global(module, name)


def _stop(m: _Machine) -> None:
    m.done = True


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _put(size: int) -> Callable[[_Machine], None]:
    def put(m: _Machine) -> None:
        m.memo[m.number(size)] = m.stack[-1]

    return put


def _signed(m: _Machine, size: int) -> int:
    return int.from_bytes(m.take(size), "little", signed=True)


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    ord(letter): action
    for letter, action in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        ".": _stop,
        "(": _mark,
        "0": lambda m: m.stack.pop(),
        "1": lambda m: m.since_mark(),
        "2": _push(lambda m: m.stack[-1]),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "J": _push(lambda m: _signed(m, 4)),
        "K": _push(lambda m: m.number(1)),
        "M": _push(lambda m: m.number(2)),
        "\x8a": _push(lambda m: _signed(m, m.number(1))),  # LONG1
        "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        "X": _push(lambda m: m.take(m.number(4)).decode()),
        "\x8c": _push(lambda m: m.take(m.number(1)).decode()),
        "\x8d": _push(lambda m: m.take(m.number(8)).decode()),
        "B": _push(lambda m: m.take(m.number(4))),
        "C": _push(lambda m: m.take(m.number(1))),
        "\x8e": _push(lambda m: m.take(m.number(8))),
        "\x96": _push(lambda m: bytearray(m.take(m.number(8)))),
        "]": _push(lambda m: []),
        "a": _on_pair(lambda target, value: _extend(target, [value])),
        "e": _on_marked(_extend),
        "l": _push(lambda m: m.since_mark()),
        ")": _push(lambda m: ()),
        "t": _push(lambda m: tuple(m.since_mark())),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "}": _push(lambda m: {}),
        "d": _push(_dict_since_mark),
        "s": _set_item,
        "u": _on_marked(_assign),
        "\x8f": _push(lambda m: set()),
        "\x90": _on_marked(_extend),
        "\x91": _push(lambda m: frozenset(map(_key, m.since_mark()))),
        "c": lambda m: m.push_global(m.line(), m.line()),
        "\x93": _stack_global,
        "R": _reduce,
        "\x81": _reduce,  # NEWOBJ
        "\x92": _new_with_keywords,
        "b": _on_pair(_build),
        "q": _put(1),
        "r": _put(4),
        "\x94": _memoize,
        "h": _push(lambda m: m.memo[m.number(1)]),
        "j": _push(lambda m: m.memo[m.number(4)]),
        "Q": _persistent,
    }.items()
}
