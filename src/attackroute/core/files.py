"""Files that are replaced whole, and files that are sealed: versioned, with a checksum.

Two containers carry the same header: a JSON text, and a safetensors file whose metadata holds the header beside the
tensors. The header states a format, a version and a SHA-256 checksum of everything else. Every fault in a file
becomes a one-line `UserError` that begins with its path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from attackroute.core.distributed import leading
from attackroute.core.errors import UserError

if TYPE_CHECKING:  # the command line shows its help without PyTorch
    from torch import Tensor

VERSION = 1
ROUTE_KIND = "attackroute route"
INSTANCE_ROUTES_KIND = "attackroute instance routes"

_METADATA_KEY, _WEIGHTS_KEY, _LOCK = "attackroute", "checksum", ".lock"


def replace_file(path: Path, data: bytes) -> None:
    """Write to a new file beside ``path`` and move it there: a reader sees the old content or the new, never half."""
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{printable(path)}: cannot be written: {reason}; choose another file or folder") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_sealed_json(path: str | os.PathLike[str], kind: str, body: Mapping[str, Any]) -> None:
    """Write a header and ``body`` as JSON text."""
    write_json(Path(path), _seal(kind, body, {}))


def read_sealed_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read the body that :func:`write_sealed_json` wrote, once format, version and checksum are right."""
    with file_errors(path):
        return _unseal(_header(regular_file(path).read_bytes(), kind), {})


def write_tensors(
    path: str | os.PathLike[str], kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors as safetensors, with a header and ``body`` in the metadata."""
    replace_file(Path(path), _safetensors(tensors, {_METADATA_KEY: _compact(_seal(kind, body, tensors))}))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_tensors` wrote, once format, version and checksum are right."""
    with _opened(path, kind) as (file, header):
        # a clone, so that nothing stays mapped to a file that may change
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return _unseal(_header(header, kind), tensors), tensors


def read_header(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The body that :func:`write_tensors` wrote and the checksum; damage inside of tensors goes unnoticed."""
    with _opened(path, kind) as (_, header):
        return _header(header, kind)


def sealed_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Weights as a safetensors file, with their checksum in its metadata."""
    return _safetensors(tensors, {_WEIGHTS_KEY: _checksum({}, tensors)})


def read_weights(path: Path) -> Any:
    """What a safetensors file holds, or one of PyTorch's, which can run no code; damage is found by checksums."""
    import torch

    regular_file(path)  # a pipe would be waited for
    if path.suffix == ".safetensors":
        with safe_open(os.fspath(path), framework="pt") as file:
            stated = (file.metadata() or {}).get(_WEIGHTS_KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if stated not in (None, _checksum({}, tensors)):
            raise UserError("the contents do not match the checksum")
        return tensors
    if zipfile.is_zipfile(path):  # torch.load itself does not compare the checksums that torch.save leaves in there
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise UserError(f"{broken} does not match its checksum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd pickles; what is wrong with one is said in an error
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a file's contents can cause into a `UserError` that begins with the file's path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{printable(path)}: {' '.join(str(error).split())}") from None
    except (OSError, SafetensorError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{printable(path)}: cannot be read: {' '.join(str(reason).split())}") from None


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, if it is that of a file; a pipe or a device, which might never end, is an error, as is a folder."""
    file = Path(path)
    if not stat.S_ISREG(mode := file.stat().st_mode):
        raise OSError(errno.EISDIR, "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device, not a file")
    return file


def expect_mapping(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The value of ``key``, which must be a JSON object."""
    value = body.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{key!r} must be a JSON object, not {type(value).__name__}")
    return value


def user_path(text: str) -> Path:
    """A path as users write it, with ``~`` for a home; a `UserError` where there can be none of that name."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{text[:60]!r} names no file: {getattr(error, 'strerror', None) or error}") from None
    return path


def printable(path: str | os.PathLike[str]) -> str:
    """A path as it can stand in a message of one line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def made_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of that name, made when it is missing, by the first process where there are several."""
    folder = Path(path)
    try:
        if leading():
            folder.mkdir(parents=True, exist_ok=True)
            os.stat(f"{folder}/.")  # refused where the folder may not be entered
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be a folder ({error.strerror}); choose another folder") from None
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for this process: to two at once neither's files would belong.

    The lock goes with the process, however it ends, and is not its children's, such as workers that outlive it a while.
    """
    path = made_folder(folder) / _LOCK
    with ExitStack() as stack:
        try:
            import fcntl

            fcntl.lockf(stack.enter_context(path.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(path.unlink, missing_ok=True)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {printable(folder)}: wait for its end, or choose another folder"
            ) from None
        except (ImportError, OSError):  # neither on Windows nor on every file system
            pass
        yield


@contextmanager
def _opened(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, str]]:
    """A safetensors file, open for its tensors, and the header in its metadata."""
    with file_errors(path):
        regular_file(path).open("rb").close()  # safe_open words its own errors for such files less clearly
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = (file.metadata() or {}).get(_METADATA_KEY)
                if header is None:
                    raise UserError(f"a safetensors file, but not an {kind} file")
                yield file, header
        except SafetensorError as error:
            raise UserError(f"not an {kind} file, or a damaged one: {error}") from None


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    # copies, since safetensors refuses tensors that share memory, as labels and predictions may, or tied weights
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(copies, metadata=metadata)


def _seal(kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stated = {"format": kind, "version": VERSION}
    return {**stated, "checksum": _checksum({**stated, **body}, tensors), **body}


def _header(text: str | bytes, kind: str) -> dict[str, Any]:
    """A header with the body in it, once format and version are right."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not an {kind} file, or a damaged one: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("format"), str):
        raise UserError(f"not an {kind} file: it states no format")
    if header["format"] != kind:
        raise UserError(f"holds {header['format']!r}, not {kind!r}: choose the loader that belongs to it")
    version = header.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(f"has file version {version!r}, this attackroute reads {VERSION}: use the one that wrote it")
    return header


def _unseal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The body, once the checksum is right."""
    content = {key: value for key, value in header.items() if key != "checksum"}
    if header.get("checksum") != _checksum(content, tensors):
        raise UserError("damaged or edited: the contents do not match the checksum; write it anew")
    return {key: value for key, value in content.items() if key not in {"format", "version"}}


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_compact(content).encode())
    for name in sorted(tensors):
        update_digest(digest, name, tensors[name])
    return f"sha256:{digest.hexdigest()}"


def update_digest(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Add a tensor to a digest: its name, type, shape and values."""
    import torch

    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}".encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)  # as bytes, since numpy has no bfloat16


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
