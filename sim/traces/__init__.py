"""Recorded routing decisions, read from the formats people have. Knows files and arrays, nothing of traffic or gates.

``read(path)`` tells the format by the file's name and first bytes: ``npz`` (our own arrays; `sim.traces.npz`),
``megatron`` (Megatron-LM's router tracer, JSON lines), ``sglang`` (SGLang's expert distribution recorder, as npz or
JSON) and ``esft`` (text files of DeepSeek's ESFT). No file is trusted: sizes and headers come first, pickles are never
loaded, and everything wrong is a ValueError of one line, ``path: array or line: expected ..., found ...``.
"""

from __future__ import annotations

import os
import zipfile

from sim.traces.trace import RecordedTrace, checked

__all__ = ["RecordedTrace", "checked", "read"]

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")


def read(path: str | os.PathLike[str], n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace at ``path`` (a file, or for ESFT also a folder).

    n_routed_experts: E of the model; by default what the file says, else the largest expert id met + 1.
    Raises ValueError, one line, for anything that is not a well-formed trace.
    """
    name = os.fspath(path)
    if n_routed_experts is not None and n_routed_experts < 1:
        raise ValueError(f"n_routed_experts: expected at least 1, found {n_routed_experts}")
    if os.path.isdir(name):
        from sim.traces.esft import read_folder

        return read_folder(name, n_routed_experts)
    if not os.path.isfile(name):  # before opening: a pipe or a device would block
        raise ValueError(f"{name}: expected a trace file, found {'something else' if os.path.exists(name) else 'none'}")
    ending = os.path.splitext(name)[1].lower()
    if ending in _PICKLES:
        raise ValueError(
            f"{name}: expected npz, JSON, JSON lines or text, found {ending}, a pickle, which is never loaded (it can run "
            f"code); convert it where you trust it: np.savez(out, topk_ids_of_layer=record['topk_ids_of_layer'].numpy())"
        )
    if ending == ".jsonl":
        from sim.traces.megatron import read_jsonl

        return read_jsonl(name, n_routed_experts)
    if ending == ".json":
        from sim.traces.sglang import read_json

        return read_json(name, n_routed_experts)
    if ending == ".txt":
        from sim.traces.esft import read_files

        return read_files([name], name, n_routed_experts)
    from sim.traces import npz, sglang

    # A damaged zip is for the npz reader to explain.
    if sglang.KEY in _members(name):
        return sglang.read_npz_arrays(name, n_routed_experts)
    return npz.read_arrays(name, n_routed_experts)


def _members(path: str) -> set[str]:
    """Names of the arrays in the zip at ``path``; empty for a file that is no sound, small zip."""
    from sim.traces.npzfile import check_directory

    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy") for info in archive.filelist}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, UnicodeError):
        return set()
