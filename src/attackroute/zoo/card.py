"""``model.json``: how the network is built whose weights lie beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.files import replace_file
from attackroute.zoo.spec import ModelSpec

CARD = "model.json"


_FORMAT = "attackroute model"


_VERSION = 1


_SEQUENCES = ("mean", "std")


@dataclass(frozen=True)
class ModelCard:
    """What ``model.json`` says about the weights beside it.

    Attributes:
        spec: How the network is built.
        classes: Names of the labels that it was trained for.
    """

    spec: ModelSpec
    classes: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write ``model.json``, unless the folder describes another network already.

        Raises:
            UserError: It does, or the file cannot be written.
        """
        if (folder / CARD).exists() and ModelCard.load(folder) != self:
            raise UserError(
                f"{folder / CARD} describes another network than this one; "
                "choose another folder, or give the --model, --width and --data that it was made with"
            )
        content = {"format": _FORMAT, "version": _VERSION, "model": asdict(self.spec), "classes": list(self.classes)}
        replace_file(folder / CARD, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> ModelCard:
        """Read ``model.json``.

        Raises:
            UserError: The file is missing, damaged or something else.
        """
        path = folder / CARD
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder} has no {CARD}; name a folder that attackroute train wrote") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train again, or mend it") from error
        try:
            return cls._parse(content)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not describe a network (version {_VERSION}); train again") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> ModelCard:
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise KeyError("format")
        fields: dict[str, Any] = {
            name: tuple(value) if name in _SEQUENCES and value is not None else value
            for name, value in content["model"].items()
        }
        return cls(ModelSpec(**fields), tuple(map(str, content["classes"])))
