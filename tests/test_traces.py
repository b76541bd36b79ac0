"""Readers of recorded routing: well-formed files of every format, and files that are not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.traces import RecordedTrace, read, textfile

RNG = np.random.Generator(np.random.Philox(1))
IDS = np.argsort(RNG.random((2, 10, 8)), axis=2)[..., :3].astype(np.int64)  # [layer, token, k]
WEIGHTS = RNG.random((2, 10, 3))
LENGTHS = [4, 6]


def same(trace: RecordedTrace, lengths: list[int], layers: tuple[int, ...]) -> None:
    assert np.array_equal(trace.topk_ids, IDS) and trace.topk_ids.dtype == np.int16
    assert trace.seqlens.tolist() == lengths and trace.layers == layers
    assert not trace.topk_ids.flags.writeable


def records() -> list[dict[str, Any]]:
    """Two records (steps) of two layers, as Megatron's tracer writes them."""
    found = []
    for step, (start, n) in enumerate(((0, 4), (4, 6))):
        for layer in (3, 4):
            ids = IDS[layer - 3, start : start + n].tolist()
            found.append(
                {"step": step, "stage": "fwd", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": n, "topk": 3, "top_indices": ids}
            )  # fmt: skip
    return found


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def esft_text(layer: int) -> str:
    lines, start = [], 0
    for n in LENGTHS:
        ids, weights = (array[layer, start : start + n].ravel() for array in (IDS, WEIGHTS))
        lines.append("\t".join(map(str, ids)) + "\t\t" + "\t".join(f"{weight:.6f}" for weight in weights))
        start += n
    return "\n".join(lines) + "\n"


def write_esft(folder: Path) -> str:
    for layer in (0, 1):
        (folder / f"expert_weights_{layer + 1}.txt").write_text(esft_text(layer))
    return str(folder)


def test_megatron(tmp_path: Path) -> None:
    prediction = {"block": "mtp", "layer": 9, "top_indices": [[1, 2]]}
    same(read(write_jsonl(tmp_path / "t.jsonl", [*records(), prediction])), LENGTHS, (3, 4))
    own = [record | {"seqlens": [1, record["num_tokens"] - 1]} for record in records()]
    same(read(write_jsonl(tmp_path / "u.jsonl", own), 8), [1, 3, 1, 5], (3, 4))


def test_sglang(tmp_path: Path) -> None:
    # A dense layer in front and a padded token at the end hold -1.
    padded = np.full((3, 11, 3), -1)
    padded[1:, :10] = IDS
    passes = [{"topk_ids_of_layer": padded[:, :4].tolist(), "extend_seq_lens": [4]}]
    passes.append({"topk_ids_of_layer": padded[:, 4:].tolist(), "positions": [0, 1, 2, 3, 4, 5, 0]})
    (tmp_path / "t.json").write_text(json.dumps({"records": passes}))
    trace = read(tmp_path / "t.json")
    assert np.array_equal(trace.topk_ids, IDS) and trace.layers == (1, 2) and trace.seqlens.tolist() == [4, 6, 0]
    np.savez(tmp_path / "t.npz", topk_ids_of_layer=padded[1:, :10], positions=np.array([0, 1, 2, 3, *range(6)]))
    same(read(tmp_path / "t.npz"), LENGTHS, (0, 1))


def test_esft(tmp_path: Path) -> None:
    trace = read(write_esft(tmp_path), 8)
    same(trace, LENGTHS, (1, 2))
    assert trace.topk_weights is not None and np.allclose(trace.topk_weights, WEIGHTS, atol=1e-6)
    one = read(tmp_path / "expert_weights_2.txt")
    assert np.array_equal(one.topk_ids[0], IDS[1]) and one.layers == (2,)


def test_npz_with_scores_but_no_ids(tmp_path: Path) -> None:
    logits = RNG.standard_normal((2, 10, 8)).astype(np.float32)
    np.savez(tmp_path / "t.npz", logits=logits, num_experts_per_tok=np.array(3))
    trace = read(tmp_path / "t.npz")
    assert np.array_equal(trace.topk_ids, np.argsort(-logits, axis=2, kind="stable")[..., :3])
    assert trace.score_kind == "logits" and trace.n_routed_experts == 8


def test_parts_of_a_trace_are_its_sequences_and_layers(tmp_path: Path) -> None:
    trace = read(write_esft(tmp_path))
    part = trace.part(sequences=[1], layers=[1])
    assert np.array_equal(part.topk_ids[0], IDS[1, 4:]) and part.layers == (2,) and part.seqlens.tolist() == [6]


def changed(index: int, **change: Any) -> list[dict[str, Any]]:
    lines = records()
    lines[index] = {name: value for name, value in (lines[index] | change).items() if value is not None}
    return lines


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "expected records with layer and top_indices, found none"),
        (changed(1, layer=None), "line 2: expected the field layer, found block"),
        (changed(1, top_indices=None), "line 2: expected the field top_indices"),
        (changed(1, layer="3"), "line 2: layer: expected an integer, found '3'"),
        (changed(1, layer=True), "line 2: layer: expected an integer"),
        (changed(2, rank=1), "line 3: rank: expected one rank per file"),
        (changed(0, num_tokens=5), "line 1: num_tokens: expected 4 .of top_indices., found 5"),
        (changed(0, topk=2), "line 1: topk: expected 3"),
        (changed(0, top_indices=[[1, 2], [3]], num_tokens=None), "line 1: top_indices: expected 2-dimensional lists"),
        (
            changed(0, top_indices=[[1, 2.5, 3]], num_tokens=None),
            "top_indices: expected 2-dimensional lists of integers",
        ),
        (changed(0, top_indices=[[1, 1, 3]] * 4), "top_indices: expected distinct experts per token"),
        (changed(0, top_indices=[[1, -1, 3]] * 4), r"top_indices: expected ids in 0\.\..*, found -1"),
        (changed(0, top_indices=[[1, 10**30, 3]] * 4), "top_indices: expected"),
        (changed(0, top_indices=[[1, 2**40, 3]] * 4), "n_routed_experts: expected at most 32768"),
        (changed(0, seqlens=[1, 2]), "line 1: seqlens: expected a sum of 4, found 3"),
        (records()[:3], "layer 4: expected the 2 records and lengths of layer 3, found 1 records"),
    ],
)
def test_broken_megatron_files_are_refused_by_line_and_field(
    tmp_path: Path, lines: list[dict[str, Any]], said: str
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", lines)
    with pytest.raises(ValueError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", b"{", "line 1: expected JSON, found"),
        ("t.jsonl", b"[1]", "line 1: expected a JSON object, found list"),
        ("t.jsonl", b'{"a":' + b"[" * 100_000, "line 1: expected at most 16 levels of nesting"),
        ("t.jsonl", b"\xff\xfe\x00", "line 1: expected JSON, found"),
        ("t.json", b"", "expected JSON, found"),
        ("t.json", b'{"records": []}', "records: expected a list of per_token records, found records"),
        ("t.json", b'{"logical_count": [[[1]]]}', "found logical_count, which holds no tokens"),
        ("t.json", b'{"records": [{"a": 1}]}', "records 0: topk_ids_of_layer: expected ids .mode per_token., found a"),
        (
            "t.json",
            b'{"records": [{"topk_ids_of_layer": [[[-1]]]}]}',
            "topk_ids_of_layer: expected experts, found none",
        ),
        (
            "t.json",
            b'{"records": [{"topk_ids_of_layer": [[[1]]], "extend_seq_lens": [2]}]}',
            "extend_seq_lens: expected a sum of 1, found 2",
        ),
        ("expert_weights_1.txt", b"", "expected lines of ids and weights, found none"),
        ("expert_weights_1.txt", b"1\t2\t3\n", "line 1: expected ids, two tabs and weights"),
        ("expert_weights_1.txt", b"1\t2\t\t0.5\n", "line 1: expected as many weights as ids .2., found 1"),
        ("expert_weights_1.txt", b"1\tx\t\t0.5\t0.5\n", "line 1: expected numbers separated by tabs"),
        ("expert_weights_1.txt", b"1\t-2\t\t0.5\t0.5\n", r"line 1: expected ids in 0\.\.32767, found -2\.\.1"),
        ("expert_weights_1.txt", b"1\t2\t\t0.5\tnan\n", "topk_weights: expected finite weights"),
        ("expert_weights_x.txt", b"1\t\t0.5\n", "expected a file called expert_weights_<layer>.txt"),
        ("t.npz", b"PK", "expected an npz .zip. file"),
        ("t.pt", b"\x80\x02", "found .pt, a pickle, which is never loaded"),
        ("t.pkl", b"cos\nsystem\n(S'false'\ntR.", "a pickle, which is never loaded"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_esft_layers_must_agree(tmp_path: Path) -> None:
    write_esft(tmp_path)
    (tmp_path / "expert_weights_2.txt").write_text(esft_text(1).splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="expected 2 lines as long as those of layer 1, found 1 lines"):
        read(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"expected 1 to 1024 files expert_weights_<layer>\.txt, found 0"):
        read(empty)


def test_counts_without_tokens_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", logical_count=np.ones((2, 3, 8), dtype=np.int64))
    with pytest.raises(ValueError, match="topk_ids: expected the experts of every token, found logical_count alone"):
        read(tmp_path / "t.npz")


def test_objects_in_an_npz_are_not_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "boom",))

    np.savez(tmp_path / "t.npz", topk_ids_of_layer=np.array([[[Bomb()]]], dtype=object))
    with pytest.raises(ValueError, match="topk_ids_of_layer: expected integers, found dtype object"):
        read(tmp_path / "t.npz")
    assert not (tmp_path / "boom").exists()


def test_a_declared_bomb_is_refused_before_its_data_is_read(tmp_path: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000, 1000000, 1000), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "topk_ids_of_layer.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + b"\0" * 10**7
        )
    with pytest.raises(
        ValueError, match=r"topk_ids_of_layer: expected \d+ bytes for shape \(1000, 1000000, 1000\), found"
    ):
        read(tmp_path / "t.npz")


def test_limits_of_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", records())
    for limit, value, said in (
        ("MAX_FILE_BYTES", 100, "expected at most 100 bytes, found"),
        ("MAX_LINE_BYTES", 50, "line 1: expected at most 50 bytes, found more"),
        ("MAX_LINES", 3, "expected at most 3 lines, found more"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(textfile, limit, value)
            with pytest.raises(ValueError, match=said):
                read(path)


def test_what_is_no_file_is_refused_without_opening(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a trace file, found none"):
        read(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="expected a trace file, found something else"):
        read("/dev/zero")
    with pytest.raises(ValueError, match="n_routed_experts: expected at least 1"):
        read(tmp_path / "absent.npz", 0)
