"""Parameters, FLOPs and cache bytes of the shipped models, from their configurations."""

from __future__ import annotations

from collections.abc import Iterator

from ruamel.yaml import YAML

from sim.model import Model
from sim.validation import Figure, Inputs


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the published sizes of every model that has them, and the training FLOPs of DeepSeek-V2 and V3."""
    reader = YAML(typ="safe", pure=True)
    models = {
        path.stem: Model.model_validate(reader.load(path)) for path in (inputs.scenarios / "models").glob("*.yaml")
    }
    for name, model in sorted(models.items()):
        published = model.published
        if published is None:
            continue
        active = {
            "nothing": model.active_parameters,
            "input_embedding": model.active_parameters_without_input_embedding,
            "embeddings": model.active_parameters_without_embeddings,
        }[published.active_excludes]
        source = (model.source or "").split(";")[0]
        if published.total_b is not None:
            yield Figure(
                f"{name}: parameters",
                source,
                published.total_b,
                model.total_parameters / 1e9,
                published.tolerance,
                "1e9",
            )
        if published.active_b is not None:
            yield Figure(f"{name}: active", source, published.active_b, active / 1e9, published.tolerance, "1e9")
    isca = "arXiv 2505.09343, Table"
    for name, gflop in (("deepseek_v2", 155.0), ("deepseek_v3", 250.0)):
        ours = models[name].training_flops_per_token(4096) / 1e9
        yield Figure(f"{name}: training FLOPs per token", f"{isca} 2", gflop, ours, 0.005, "1e9")
    v3 = models["deepseek_v3"]
    share = 432 / 385
    ours = v3.training_flops_per_token(4096, causal=False) / v3.training_flops_per_token(4096)
    yield Figure("deepseek_v3: non-causal / causal FLOPs", f"{isca} 4 (432 and 385 TFLOPS)", share, ours, 0.002)
    for name, published_bytes in (("deepseek_v3", 70_272), ("llama3_1_405b", 516_096)):
        yield Figure(
            f"{name}: KV cache per token", f"{isca} 1", published_bytes, models[name].kv_cache_bytes_per_token(), 0, "B"
        )
