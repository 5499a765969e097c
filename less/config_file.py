"""The file of a ``LessConfig``: its settings as JSON, in a folder of its own or a sidekick's."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from less.files import read_json, write_whole
from less.policies import policy_from_dict, policy_to_dict
from less.sidekick import shipped_names

CONFIG_FILE = "less_config.json"
FORMAT = "less-config"
_VERSION = 1
_FOLDERS = ("sidekick", "calibration")  # settings that name one

T = TypeVar("T", bound="ConfigFile")


class ConfigFile:
    """How a ``LessConfig``, whose base this is, becomes JSON and comes back."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON-ready values; ``from_dict`` takes them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("tokens", "shape"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        if values["policy"] is not None:
            values["policy"] = policy_to_dict(values["policy"])
        return {"format": FORMAT, "version": _VERSION, **values}

    @classmethod
    def from_dict(cls: type[T], d: dict[str, Any]) -> T:
        """Build the config from ``to_dict``'s result.

        Raises:
            ValueError: It is of another format or version, or a setting is unknown or wrong.
        """
        settings = dict(d)
        kind, version = settings.pop("format", None), settings.pop("version", None)
        if (kind, version) != (FORMAT, _VERSION):
            raise ValueError(
                f"LessConfig: format must be {FORMAT!r} version {_VERSION}, got {kind!r} {version}"
            )
        return cls.from_settings(settings)

    @classmethod
    def from_settings(cls: type[T], d: Mapping[str, Any]) -> T:
        """Build the config from its settings as JSON has them, a policy as ``policy_to_dict``.

        Raises:
            ValueError: A setting is unknown or wrong.
        """
        settings = dict(d)
        unknown = sorted(settings.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"LessConfig: unknown settings {unknown}")
        if settings.get("policy") is not None:
            settings["policy"] = policy_from_dict(settings["policy"])
        made: T = cls(**settings)
        return made

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``less_config.json`` into a folder: the sidekick's, or one of its own.

        A sidekick in that folder is named relative to it, so the folder can be moved; another one
        by its whole path.
        """
        here = Path(folder)
        values = self.to_dict()
        for setting in _FOLDERS:
            folder_of = getattr(self, setting)
            if folder_of is not None and folder_of not in shipped_names():
                path = Path(folder_of).resolve()
                inside = path.is_relative_to(here.resolve())
                values[setting] = (
                    path.relative_to(here.resolve()).as_posix() if inside else str(path)
                )
        here.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        write_whole(here / CONFIG_FILE, text)

    @classmethod
    def from_pretrained(cls: type[T], folder: str | os.PathLike[str]) -> T:
        """Read ``less_config.json`` from a folder.

        Raises:
            ValueError: There is none, it cannot be read, or a setting is wrong; the message names
                the file.
        """
        file = Path(folder) / CONFIG_FILE
        try:
            values = read_json(str(file), file)
        except (OSError, ValueError) as error:
            raise ValueError(f"LessConfig: cannot read {file}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"LessConfig: {file} must hold an object")
        for setting in _FOLDERS:
            named = values.get(setting)
            if isinstance(named, str) and named not in shipped_names():
                values[setting] = str(Path(folder) / named)  # a whole path stays what it is
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:  # a policy refuses what is missing by TypeError
            said = str(error).removeprefix("LessConfig: ")
            raise ValueError(f"LessConfig: {file}: {said}") from error
