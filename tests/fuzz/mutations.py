"""Ways to damage a file, each drawn from a seeded generator, so that a number names a damage for ever."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

# What a value may be replaced by: of the wrong type, out of range, huge, or not a number.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 65, 1000, 2**15, 2**31, 10**9, 10**12, 2**63, 2**64, 10**30, -(2**31),
    0.5, -1.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "64", "null", "nan", "\ud800",
    "\x00", "../../etc/passwd", "é" * 300, "a" * 100_000, [], [None], [1, 2, 3], [[]], {}, {"a": 1}, {"": {}},
    [0] * 10_000, "w4a16", "llama", "float16", "linear", "LlamaForCausalLM",
)  # fmt: skip


def mutate(path: Path, random: Random) -> str:
    """Damage a file in place; returns what was done, in a few words."""
    kinds: dict[str, tuple[Callable[[Path, Random], str], ...]] = {
        ".json": (_json,) * 6 + (_text,),
        ".yaml": (_yaml,) * 5 + (_text, _bomb),
        ".jinja": (_template,) * 3 + (_text,),
        ".safetensors": (_header,) * 3 + (_bytes,) * 2,
        ".gguf": (_bytes,) * 4 + (_words,) * 4,
    }
    return random.choice(kinds[path.suffix])(path, random)


def _json(path: Path, random: Random) -> str:
    data, done = json.loads(path.read_text()), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data, what = _edit(data, random)
        done.append(what)
    path.write_text(json.dumps(data))
    return "; ".join(done)


def _edit(data: Any, random: Random) -> tuple[Any, str]:
    """JSON data with one value changed, removed, renamed, swapped or wrapped."""
    data = copy.deepcopy(data)
    places = list(_places(data))
    if not places:
        return random.choice(_VALUES), "the whole replaced"
    # As likely near the top as in a long list.
    depth = random.choice(sorted({len(path) for _, _, path in places}))
    holder, key, path = random.choice([place for place in places if len(place[2]) == depth])
    name, what = ".".join(map(str, path[:8])), random.randrange(12)
    if what == 0:
        del holder[key]
        return data, f"{name} removed"
    if what == 1:
        other, at, where = random.choice(places)
        holder[key] = copy.deepcopy(other[at]) if where[: len(path)] != path else None
        return data, f"{name} is {'.'.join(map(str, where))}"
    if what == 2 and isinstance(holder, dict):
        holder[random.choice(("x", "", f"{key}_", str(key).upper()))] = holder.pop(key)
        return data, f"{name} renamed"
    if what in (3, 4) and isinstance(holder[key], int | float):
        scaled = random.choice((-1, 2, 3, 0.5, 10, 1000, 10**6))
        holder[key] = type(holder[key])(holder[key] * scaled)
        return data, f"{name} times {scaled}"
    if what == 5:
        for _ in range(random.choice((1, 2, 70, 100))):
            holder[key] = random.choice(([holder[key]], {"a": holder[key]}))
        return data, f"{name} wrapped"
    value = random.choice(_VALUES)
    holder[key] = copy.deepcopy(value)
    return data, f"{name} = {str(value)[:40]!r}"


def _places(data: Any, path: tuple = ()):
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(pairs):
        yield data, key, (*path, key)
        yield from _places(value, (*path, key))


def _text(path: Path, random: Random) -> str:
    """Damage that leaves no file of its kind, or hardly one."""
    text, what = path.read_text(), random.randrange(10)
    if what == 0:
        path.write_text("")
        return "empty"
    if what == 1:
        path.write_text(text[: random.randrange(len(text))])
        return "cut off"
    if what == 2:
        path.write_bytes(text.encode("utf-16"))
        return "UTF-16"
    if what == 3:
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        return "byte order mark"
    if what == 4:
        path.write_bytes(random.randbytes(200))
        return "noise"
    if what == 5:
        path.write_text("[" * random.choice((100, 5_000, 200_000)))
        return "brackets"
    if what == 6:
        path.unlink()
        path.mkdir()
        return "a folder"
    if what == 7:
        path.unlink()
        path.symlink_to("nowhere")
        return "a link to nothing"
    if what == 8:
        data = bytearray(text.encode())
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data)
        return "bytes changed"
    sign, other = random.choice((":", ",", '"', "}", "1")), random.choice(("", " ", "::", "9" * 5000))
    path.write_text(text.replace(sign, other, 1))
    return "a sign replaced"


def _yaml(path: Path, random: Random) -> str:
    data, done = yaml.safe_load(path.read_text()), []
    for _ in range(random.choice((1, 1, 2))):
        data, what = _edit(data, random)
        done.append(what)
    try:
        path.write_text(yaml.safe_dump(data, sort_keys=False))
    except UnicodeEncodeError:
        path.write_bytes(b"scheme: \xff\n")
    return "; ".join(done)


def _bomb(path: Path, random: Random) -> str:
    aliases = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    bombs = {
        "aliases": aliases, "flow": "scheme: " + "[" * 50_000, "maps": "scheme: " + "{a: " * 5_000 + "}" * 5_000,
        "blocks": "".join(f"{' ' * i}a:\n" for i in range(2_000)), "tag": "scheme: !!python/object/apply:os.abort []\n",
        "digits": f"scheme: w8a16\naccuracy_level: {'9' * 10_000}\n", "time": "scheme: 2001-99-99\n",
        "key": "? [a, b]\n: c\n", "merge": "<<: [1, 2]\nscheme: w8a16\n", "long": "scheme: " + "a" * 3_000_000,
        "bits": "scheme: w999999999999a16_g99999999999\n", "sixty": "scheme: 190:20:30.15\n",
        "many": "a: b\n" * 100_000,
    }  # fmt: skip
    name = random.choice(sorted(bombs))
    path.write_text(bombs[name])
    return f"bomb: {name}"


def _template(path: Path, random: Random) -> str:
    lines = (
        "{{ raise_exception('no') }}", "{{ messages[99].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ undefined.x.y }}",
        "{{ 'a' * 10 ** 9 }}", "{{ range(10 ** 9) | list }}", "{{ messages.__class__.__mro__ }}", "{% include 'x' %}",
        "{{ messages | tojson | tojson }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ '\\ud800' }}", "{{",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "", "{% set x = namespace(v=messages) %}{% for i in range(9) %}{% set x.v = x.v + x.v %}{% endfor %}{{ x.v }}",
    )  # fmt: skip
    line = random.choice(lines)
    path.write_text(line + path.read_text() if random.random() < 0.5 else line)
    return f"template: {line[:40]}"


def _header(path: Path, random: Random) -> str:
    """Change the table of tensors of a safetensors file, its length kept right or not."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, what = _edit(json.loads(data[8 : 8 + length]), random)
    encoded = json.dumps(header).encode()
    said = random.choice((len(encoded),) * 5 + (0, length, 2**40, 2**63))
    path.write_bytes(struct.pack("<Q", said) + encoded + data[8 + length :])
    return f"header: {what}"


def _bytes(path: Path, random: Random) -> str:
    """Cut a file off, or change bytes, most of them near its beginning."""
    data = bytearray(path.read_bytes())
    if random.random() < 0.25:
        path.write_bytes(data[: int(len(data) * random.random())])
        return "cut off"
    reach = random.choice((24, 200, 2_000, len(data)))
    for _ in range(random.choice((1, 2, 8, 64))):
        data[random.randrange(min(reach, len(data)))] = random.choice((0, 1, 255, random.randrange(256)))
    path.write_bytes(data)
    return f"bytes of the first {reach} changed"


def _words(path: Path, random: Random) -> str:
    """Write a size over another: what counts and lengths of binary files are."""
    data = bytearray(path.read_bytes())
    size = random.choice((4, 8))
    at = random.choice((8, 16, 24, random.randrange(24, 4_000)))
    value = random.choice((0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 10**6, 10**9, 10**12, 2**63 - 1, 2**64 - 1))
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    path.write_bytes(data)
    return f"{size} bytes at {at} = {value}"
