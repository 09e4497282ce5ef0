"""What an experiment file is read with: YAML that names no key twice, paths relative to it."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from nnssl.errors import NnsslError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice (of which it would silently take the last) and what holds itself."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for child, _ in node.value:
        if child.tag == "tag:yaml.org,2002:merge":
            continue  # what is merged in yields to what the mapping says itself
        name = loader.construct_object(child, deep=True)
        if not isinstance(name, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", child.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"'{name}' is given twice", child.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


# with their content made first (deep), PyYAML refuses a mapping or list that holds itself
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG, _sequence)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        NnsslError: the file is missing, is no YAML, names a key twice or holds no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506  a safe loader
    except OSError as error:
        raise NnsslError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise NnsslError(f"{path} is nested too deeply, or refers to itself.") from None
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        # numbers of thousands of digits, dates that do not exist, tags in odd places: PyYAML lets what Python says through
        text = " ".join(str(error).split())
        why = "refers to itself." if "recursive node" in text else f"is no YAML: {text}"
        raise NnsslError(f"{path} {why}") from error
    if not isinstance(content, dict):
        raise NnsslError(f"{path} holds no settings: lines such as 'dataset: 4' are expected.")
    return {str(k): v for k, v in content.items()}


def resolve_path(text: str, folder: Path) -> Path:
    """A path of the file: ``$VARIABLES`` and ``~`` are filled in; a relative one is relative to the file.

    Raises:
        NnsslError: a variable that is not set.
    """
    filled = os.path.expanduser(os.path.expandvars(text))
    if "$" in filled:
        raise NnsslError(f"'{text}' names a variable that is not set.")
    return Path(os.path.normpath(folder / filled))
