"""Format 1 of ``meta['mmprune']``: what stands in it, checked before any of it is believed."""

import hashlib
import json
import re
import reprlib
from typing import Any

from mmprune.errors import PruneError

FORMAT = 1
"""Version of ``meta['mmprune']``. Readers refuse later ones."""


def checksum(meta: dict[str, Any]) -> str:
    """Of all parts of a meta but itself."""
    parts = {part: meta[part] for part in (*_PARTS, 'aliases') if part in meta}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_PARTS = {
    'format': int, 'mmprune': str, 'fingerprint': dict, 'keep': dict, 'attributes': dict,
    'history': list, 'budget': dict,
}  # fmt: skip
_ATTRIBUTE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*')


def _bad(where: str, found: Any, wanted: str) -> PruneError:
    return PruneError(
        f"meta['mmprune']{where} is {_told(found)}, not {wanted}: the file is truncated or corrupt, or "
        'was not written by mmprune; use another checkpoint'
    )


def _told(value: Any) -> str:
    """At most 80 characters of what may be endless."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f'something huge ({type(value).__name__})'
    return text if len(text) <= 80 else text[:77] + '...'


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_plain(value: Any, depth: int = 6) -> bool:
    if value is None or isinstance(value, bool | str | float) or _is_int(value):
        return True
    if depth == 0 or not isinstance(value, dict | list | tuple):
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    return all(_is_plain(v, depth - 1) for v in value)


_NOTED = {
    'iteration': (_is_int, 'an integer'),
    'latency': (lambda value: isinstance(value, float) or _is_int(value), 'a number'),
    'units_removed': (_is_int, 'an integer'),
    'uneven': (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        'a list of strings',
    ),
}


def check_meta(meta: Any) -> None:
    """Every part of what :meth:`mmprune.Plan.to_meta` wrote.

    Raises:
        PruneError: corrupt, of a later format, or not a plan; the message names the part.
    """
    if not isinstance(meta, dict):
        raise _bad('', meta, 'a dict')
    later = meta.get('format')
    if isinstance(later, int) and later > FORMAT:
        raise PruneError(
            f"meta['mmprune'] has format {_told(later)}, this mmprune reads up to {FORMAT}: it was "
            f'written by mmprune {_told(meta.get("mmprune"))}; install that version or a later one'
        )
    for part, kind in _PARTS.items():
        if not isinstance(meta.get(part), kind) or isinstance(meta.get(part), bool):
            raise _bad(f'[{part!r}]', meta.get(part), f'of type {kind.__name__}')
    if meta['format'] != FORMAT:
        raise _bad("['format']", meta['format'], str(FORMAT))
    for name, shape in meta['fingerprint'].items():
        if (
            not isinstance(name, str)
            or not isinstance(shape, list)
            or not all(_is_int(n) and n >= 0 for n in shape)
        ):
            raise _bad(f"['fingerprint'][{_told(name)}]", shape, 'a shape')
    for name, dims in meta['keep'].items():
        shape = meta['fingerprint'].get(name)
        if shape is None or not isinstance(dims, dict):
            raise _bad(f"['keep'][{_told(name)}]", dims, 'a dict of a tensor in the fingerprint')
        for dim, kept in dims.items():
            at = f"['keep'][{_told(name)}][{_told(dim)}]"
            if not _is_int(dim) or not 0 <= dim < len(shape):
                raise _bad(at, kept, f'for a dimension below {len(shape)}')
            if (
                not isinstance(kept, list)
                or not 0 < len(kept) <= shape[dim]
                or not all(map(_is_int, kept))
            ):
                raise _bad(at, kept, f'a list of 1 to {shape[dim]} indices')
            if (
                kept[0] < 0
                or kept[-1] >= shape[dim]
                or any(b <= a for a, b in zip(kept, kept[1:], strict=False))
            ):
                raise _bad(at, kept, f'ascending indices from 0 to {shape[dim] - 1}')
    _check_aliases(meta)
    for name, values in meta['attributes'].items():
        if not isinstance(name, str) or not isinstance(values, dict):
            raise _bad(f"['attributes'][{_told(name)}]", values, 'a dict of a module')
        for attribute, value in values.items():
            at = f"['attributes'][{_told(name)}][{_told(attribute)}]"
            good = isinstance(attribute, str) and len(attribute) < 200
            good = good and _ATTRIBUTE.fullmatch(attribute)
            if not good or '__' in attribute or not _is_int(value) or value < 1:
                raise _bad(at, value, 'a positive width')
    for number, entry in enumerate(meta['history']):
        if not isinstance(entry, dict) or not _is_plain(entry):
            raise _bad(f"['history'][{number}]", entry, 'a dict of plain values')
        for key in ('flops_before', 'flops', 'params_before', 'params'):
            if not _is_int(entry.get(key)) or entry[key] < key.endswith('_before'):
                raise _bad(f"['history'][{number}][{key!r}]", entry.get(key), 'a number of them')
        for key, (good, wanted) in _NOTED.items():
            if key in entry and not good(entry[key]):
                raise _bad(f"['history'][{number}][{key!r}]", entry[key], wanted)
    if not _is_plain(meta['budget']):
        raise _bad("['budget']", meta['budget'], 'a dict of plain values')
    if meta.get('checksum') != checksum(meta):
        raise _bad("['checksum']", meta.get('checksum'), 'that of what stands there')


def _check_aliases(meta: dict[str, Any]) -> None:
    aliases, shapes, keep = meta.get('aliases', {}), meta['fingerprint'], meta['keep']
    if not isinstance(aliases, dict):
        raise _bad("['aliases']", aliases, 'of type dict')
    for name, first in aliases.items():
        known = isinstance(first, str) and name in shapes and first not in aliases
        if not known or shapes[name] != shapes.get(first) or keep.get(name) != keep.get(first):
            raise _bad(f"['aliases'][{_told(name)}]", first, 'another name of the same tensor')
