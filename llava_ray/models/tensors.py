"""Read and write LLaVA folders tensor by tensor, so that no method holds a whole model in memory.

Surprising: names differ between transformers' generations. Files carry `language_model.model.*`
or `model.language_model.*`; modules carry the latter. `module_name` maps both to the modules'.
"""

import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.console import Progress
from llava_ray.errors import ArtifactError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 * 2**30
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

Pack = Callable[[str, "torch.Tensor"], "dict[str, torch.Tensor]"]
"""From a linear module's name and its weight to the tensors stored in its place."""

_READ_AHEAD = 4
"""Tensors that wait in pinned memory while a GPU packs the one before them."""

_RENAMES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^image_newline$"), "model.image_newline"),
)
_LANGUAGE_LINEAR = re.compile(
    r"^model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$"
)
_VISION_LINEAR = re.compile(
    r"^model\.(vision_tower\.encoder\.layers\.\d+\.(self_attn|mlp)\.([qkv]_proj|out_proj|fc[12])"
    r"|multi_modal_projector\.linear_[12])$"
)
_HEAD = "lm_head.weight"
_REWRITTEN = {"config.json", "manifest.json"}


def module_name(name: str) -> str:
    """Return the name that a stored tensor has as a parameter of the transformers 5 model."""
    for pattern, replacement in _RENAMES:
        name, count = pattern.subn(replacement, name, count=1)
        if count:
            break
    return name


def file_name(name: str) -> str:
    """Return the name that a parameter of the transformers 5 model has in llava-hf's own folders.

    transformers of all versions and vLLM read it; what transformers 5.6 and later write for towers
    vLLM does not (tried with 0.22.1).
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name


def is_linear(module: str, *, vision: bool) -> bool:
    """Say whether a module is a linear that methods quantize; `vision` adds tower and projector."""
    return bool(_LANGUAGE_LINEAR.match(module) or (vision and _VISION_LINEAR.match(module)))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of every stored tensor from the headers, by its name in the files."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in shards(folder):
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def tensors(folder: Path, device: str = "cpu") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield every stored tensor with its name in the files."""
    from safetensors import safe_open

    for path in shards(folder):
        with safe_open(path, framework="pt", device=device) as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, shard.get_tensor(name)


def rewrite(
    merged: Path,
    out: Path,
    *,
    dtype: "torch.dtype",
    device: str,
    quantizes: Callable[[str], bool] = lambda module: False,
    pack: Pack | None = None,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Copy a model folder, casting all floating weights and packing the modules of `quantizes`.

    The result is complete: config, tokenizer and processor files lie beside the safetensors.
    """
    progress = Progress(out.name, len(weight_shapes(merged)), "tensors")
    writer = ShardWriter(out)
    for number, (found, value) in enumerate(_read_ahead(merged, device), start=1):
        name = file_name(module_name(found))
        stem = name.removesuffix(".weight")
        if pack and stem != name and quantizes(module := module_name(stem)):
            packed = pack(module, value.to(device, dtype))
            stored = {f"{stem}.{key}": tensor for key, tensor in packed.items()}
            wait_for(device)
        else:
            stored = {name: value.to(dtype) if value.is_floating_point() else value}
        writer.add(stored)
        progress.at(number)
    writer.finish()
    copy_sidecars(merged, out)
    write_config(merged, out, dtype=dtype, quantization_config=quantization_config)


def _read_ahead(folder: Path, device: str) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every stored tensor, for a GPU from pinned memory that a thread fills meanwhile."""
    source = tensors(folder)
    if not device.startswith("cuda"):
        yield from source
        return

    def read() -> "tuple[str, torch.Tensor] | None":
        found = next(source, None)
        return found and (found[0], found[1].pin_memory())

    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(read) for _ in range(_READ_AHEAD))
        while (found := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(read))
            yield found


def wait_for(device: str) -> None:
    """Wait for a GPU, whose work is queued, so that its seconds are counted where they belong."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def copy_sidecars(merged: Path, out: Path) -> None:
    """Copy tokenizer, processor and generation files."""
    for path in sorted(merged.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".model") and path.name not in _REWRITTEN
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)


def write_config(
    merged: Path,
    out: Path,
    *,
    dtype: "torch.dtype",
    quantization_config: dict[str, Any] | None,
) -> None:
    """Write config.json with the dtype of the weights and what says how they are quantized."""
    tree = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    tree.pop("torch_dtype", None)
    name = str(dtype).removeprefix("torch.")
    tree["dtype"] = name
    for part in ("text_config", "vision_config"):
        for key in ("torch_dtype", "dtype"):
            if key in tree[part]:
                tree[part][key] = name
    if quantization_config is not None:
        tree["quantization_config"] = quantization_config
    text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def storage_dtype(merged: Path) -> "torch.dtype":
    """Return the 2-byte dtype that unquantized weights are stored in: bf16 stays, else fp16."""
    import torch

    return torch.bfloat16 if _stored_dtype(merged) == "bfloat16" else torch.float16


def compute_dtype(folder: Path, device: str) -> "torch.dtype":
    """Return the dtype to run a folder's model in: the stored one on a GPU, fp32 on a CPU.

    PyTorch's fp16 products for a prompt's many rows are about five times slower on CPUs without
    fp16 units than fp32.
    """
    import torch

    dtype: torch.dtype = getattr(torch, "float32" if device == "cpu" else _stored_dtype(folder))
    return dtype


def _stored_dtype(folder: Path) -> str:
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(tree.get("dtype") or tree.get("torch_dtype") or "float16")


class ShardWriter:
    """Write safetensors of at most SHARD_BYTES each, with an index where there are several."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._names: list[list[str]] = []

    def add(self, values: "dict[str, torch.Tensor]") -> None:
        """Take tensors by their names in the files."""
        for name, value in values.items():
            size = value.numel() * value.element_size()
            if self._pending and self._pending_bytes + size > SHARD_BYTES:
                self._flush()
            self._pending[name] = value.cpu().contiguous()
            self._pending_bytes += size

    def finish(self) -> None:
        """Write the last shard, the final names and the index."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._temporary(0).rename(self._out / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self._out / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        path = self._out / WEIGHTS_INDEX
        path.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def _temporary(self, number: int) -> Path:
        return self._out / f"shard-{number}.partial"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._temporary(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def load_model(
    folder: Path,
    device: str,
    quantizes: Callable[[str], bool] = lambda module: False,
    weights: Path | None = None,
) -> tuple[Any, dict[str, dict[str, "torch.Tensor"]]]:
    """Return the folder's model by transformers, and what its packed modules hold.

    The modules of `quantizes` have no weight yet: their stored tensors are in the second value,
    by the module's name and their own. weights: the folder of the safetensors, where it is another
    one. Raises ArtifactError when a weight is not there.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        # transformers would look for its own loader of the method.
        del config.quantization_config
    model = empty_model(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    packed: dict[str, dict[str, torch.Tensor]] = {
        name: {} for name, _ in model.named_modules() if quantizes(name)
    }
    for name in packed:
        model.get_submodule(name).weight = None
    dtype = compute_dtype(folder, device)
    wanted, values = {name for name, _ in model.named_parameters()}, {}
    for stored, value in tensors(weights or folder, device):
        name = module_name(stored)
        module, _, leaf = name.rpartition(".")
        if name in wanted:
            values[name] = value.to(dtype)
        elif module in packed:
            packed[module][leaf] = value
    tied = _HEAD in wanted - values.keys() and is_tied(config)
    if missing := sorted(wanted - values.keys() - ({_HEAD} if tied else set())):
        raise ArtifactError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]!r}; "
            "delete the folder and quantize again"
        )
    model.load_state_dict(values, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval().requires_grad_(False), packed


def empty_model(config: Any) -> Any:
    """Return transformers' model of a config, in fp32; its weights have shapes alone."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=torch.float32)


def is_tied(config: Any) -> bool:
    """Say whether the head is the embedding, so that no weight of its own is stored."""
    return bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)


def shards(folder: Path) -> list[Path]:
    """Return the safetensors that readers of a folder take, by name: model.safetensors, else
    those of its index. Raises ArtifactError where there are none."""
    names, index = {WEIGHTS}, folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        pass  # transformers takes it before an index.
    elif index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    else:
        raise ArtifactError(f"{folder}: no {WEIGHTS} and no {WEIGHTS_INDEX} there")
    return [folder / name for name in sorted(names)]


def stored_bytes(folder: Path) -> int:
    """Return what a folder's weights take on disk."""
    return sum(path.stat().st_size for path in shards(folder))
