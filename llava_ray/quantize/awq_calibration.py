"""What runs in AutoAWQ's own process (transformers 4.51): calibrate, search, pack, write.

python -m llava_ray.quantize.awq_calibration TASK.json RESULT.json

Surprising: AutoAWQ knows only text and drops long samples. Here the decoder is fed embeddings,
each image's features in place of its tokens, padded to one length; padding counts for nothing.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from awq.models.llava import LlavaAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from torch import nn

from llava_ray.console import Progress, errors_in_one_line
from llava_ray.errors import VariantError
from llava_ray.models import tensors as llava_folder
from llava_ray.models.family import family_of
from llava_ray.quantize.awq import AwqSpec
from llava_ray.quantize.awq_linear import AwqLinear, pack
from llava_ray.quantize.spec import Calibration
from llava_ray.resources.memory import peak_bytes

logger = logging.getLogger(__name__)

_MAX_TOKENS = 1024
"""Longer calibration samples are cut; LLaVA-1.5's images take 576."""
_HEAD = "language_model.lm_head.weight"
_ROWS_AT_ONCE = 16
"""Samples that run through a layer together."""


def quantize_with_autoawq(
    spec: AwqSpec, merged: Path, out: Path, calibration: Calibration, device: str
) -> int:
    """Write AutoAWQ's GEMM checkpoint, which vLLM and transformers read too.

    Returns the peak of memory in bytes. Raises VariantError where there are no calibration samples.
    """
    # fp16 products of many rows are slow, and for some shapes missing, on CPUs.
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = _load(merged, dtype)
    with torch.no_grad():
        samples = _embedded_samples(spec, model, merged, calibration, device)
        quantizer = _Quantizer(spec, model, samples, out.name, device)
        quantizer.quantize()
    _write(spec, model, merged, out)
    return peak_bytes(device)


class _Quantizer(AwqQuantizer):  # type: ignore[misc]
    """AutoAWQ's search, on embeddings instead of text and on one device."""

    def __init__(
        self, spec: AwqSpec, model: Any, samples: list[torch.Tensor], name: str, device: str
    ) -> None:
        self._samples = samples
        self._device = device
        self._layers_done = 0
        self.inps: torch.Tensor
        super().__init__(
            awq_model=LlavaAWQForCausalLM(model, "llava", False, model.config, None, None),
            model=model,
            tokenizer=None,
            w_bit=4,
            group_size=spec.group_size,
            zero_point=spec.zero_point,
            version="gemm",
            calib_data=None,
            split=None,
            text_column=None,
            duo_scaling=True,
            n_parallel_calib_samples=_ROWS_AT_ONCE,
        )
        self._progress = Progress(name, len(self.modules), "layers")

    def init_quant(
        self, n_samples: int = 0, max_seq_len: int = 0
    ) -> tuple[nn.ModuleList, dict[str, Any], torch.Tensor]:
        """Return the layers, what they are called with, and their input [samples, tokens, hidden].

        Padding stands at the end, where causal attention keeps it from the real tokens.
        """
        longest = max(len(sample) for sample in self._samples)
        inputs = nn.utils.rnn.pad_sequence(self._samples, batch_first=True)
        lengths = torch.tensor([len(sample) for sample in self._samples])
        self._real = (torch.arange(longest) < lengths[:, None])[:, :, None].to(self._device)
        positions = torch.arange(longest, device=self._device)[None]
        decoder = self.model.language_model.model
        decoder.rotary_emb.to(self._device)
        kwargs = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": decoder.rotary_emb(inputs[:1], positions),
            "use_cache": False,
        }
        return self.awq_model.get_model_layers(self.model), kwargs, inputs

    def _get_input_feat(
        self, layer: nn.Module, named_linears: dict[str, nn.Module]
    ) -> dict[str, torch.Tensor]:
        """Run the layer and return what each linear saw, padding zeroed, on the layer's device.

        A zero row changes neither a loss nor, after AutoAWQ's normalization, a scale.
        """
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in named_linears}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: seen[name].append(args[0])

        handles = [
            linear.register_forward_hook(keep(name)) for name, linear in named_linears.items()
        ]
        self.inps = self._module_forward(self.inps, layer, self.module_kwargs)
        for handle in handles:
            handle.remove()
        if self._layers_done:
            self._progress.at(self._layers_done)
        self._layers_done += 1
        return {name: torch.cat(parts) * self._real for name, parts in seen.items()}

    def _module_forward(
        self, x: torch.Tensor, module: nn.Module, module_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run a module over all samples, part by part, and zero what it says of padding."""
        parts = []
        for rows in torch.split(x, _ROWS_AT_ONCE):
            output = module(rows, **module_kwargs)
            parts.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(parts) * self._real

    def _compute_best_scale(self, *arguments: Any, **named: Any) -> Any:
        """Search as AutoAWQ does, which on a CPU takes the weights that it scales for their copy,
        so that each try would scale what the one before it left."""
        handle = arguments[3].register_state_dict_post_hook(_with_copies)
        try:
            return super()._compute_best_scale(*arguments, **named)
        finally:
            handle.remove()

    def _compute_best_clip(
        self, w: torch.Tensor, input_feat: torch.Tensor, n_grid: int = 20, max_shrink: float = 0.5
    ) -> torch.Tensor:
        """Return the clipping value of each group, [out, groups, 1].

        AutoAWQ's error, the mean of ((clipped - w) @ x) ** 2 over tokens, as the quadratic form
        d @ mean(x xT) @ dT: it takes all tokens and hundreds of times fewer operations.
        """
        rows = input_feat.reshape(-1, w.shape[1] // self.group_size, self.group_size)
        rows = rows.to(w.device).float().transpose(0, 1)
        moments = rows.transpose(1, 2) @ rows / rows.shape[1]
        groups = w.view(w.shape[0], -1, self.group_size)
        largest = groups.abs().amax(dim=-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, torch.inf, dtype=torch.float32)
        for step in range(int(max_shrink * n_grid)):
            limit = largest * (1 - step / n_grid)
            clipped = groups.clamp(-limit, limit).view_as(w)
            rounded = self.pseudo_quantize_tensor(clipped)[0].view_as(groups)
            change = (rounded.float() - groups.float()).transpose(0, 1)
            error = ((change @ moments) * change).sum(dim=-1, keepdim=True).transpose(0, 1)
            better = error < least
            best[better], least[better] = limit[better], error[better]
        return best

    def _apply_quant(self, module: nn.Module, named_linears: dict[str, nn.Linear]) -> None:
        """Round and pack the linears; same integers as AutoAWQ's, which loops over columns."""
        for name, linear in named_linears.items():
            weight = linear.weight.data.to(self._device).half()
            rounded, scales, zeros = self.pseudo_quantize_tensor(weight)
            # Without a zero point the middle of 0 to 15 stands for it.
            offsets = torch.full_like(scales, 8) if zeros is None else zeros
            levels = rounded.float().view(*scales.shape, -1) / scales.float()[:, :, None]
            steps = (levels.round() + offsets.float()[:, :, None]).clamp(0, 15).view_as(rounded)
            packed = AwqLinear(
                qweight=pack(steps.T.contiguous()),
                qzeros=pack(offsets.T.contiguous()),
                scales=scales.T.contiguous(),
                bias=None if linear.bias is None else linear.bias.data.half(),
            )
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, packed.cpu())
        # What is done leaves the device: one layer at a time lies there.
        module.cpu()


def _with_copies(module: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
    for name, value in state.items():
        state[name] = value.clone()


def _load(merged: Path, dtype: torch.dtype) -> Any:
    """Build transformers 4.51's LLaVA and fill it by the names that it uses."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    config = AutoConfig.for_model(**old_config(merged))
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, torch_dtype=torch.float32)
    values = {
        llava_folder.file_name(llava_folder.module_name(name)): value.to(dtype)
        for name, value in llava_folder.tensors(merged)
    }
    missing = set(model.load_state_dict(values, strict=False, assign=True).missing_keys)
    if llava_folder.is_tied(config):
        missing.discard(_HEAD)
    if missing:
        raise VariantError(f"{merged}: {len(missing)} weights are missing, first {min(missing)!r}")
    return model.eval().requires_grad_(False)


def old_config(folder: Path) -> dict[str, Any]:
    """Return config.json with the keys that transformers 4.51 reads (and 5 still does)."""
    tree: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (tree, tree["text_config"], tree["vision_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = "float16"
    if "image_token_id" in tree:
        tree["image_token_index"] = tree.pop("image_token_id")
    text = tree["text_config"]
    rope = text.pop("rope_parameters", None)
    if rope:
        text["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = rope
    return tree


def _embedded_samples(
    spec: AwqSpec, model: Any, merged: Path, calibration: Calibration, device: str
) -> list[torch.Tensor]:
    """Return each sample as the decoder's input, [tokens, hidden]."""
    from transformers import PreTrainedTokenizerFast

    # The class that tokenizer_config.json names may exist only in transformers 5.
    tokenizer: Any = PreTrainedTokenizerFast(**_tokenizer_files(merged))  # type: ignore[no-untyped-call]
    family = family_of(merged)
    vision = nn.ModuleList([model.vision_tower, model.multi_modal_projector]).to(device)
    embed = model.get_input_embeddings()
    embedded = []
    for sample in calibration.samples():
        tokens, shown = calibration.encode(sample, tokenizer, family, max_tokens=_MAX_TOKENS)
        is_image = tokens == family.vision.image_token_id
        hidden = embed(tokens.masked_fill(is_image, 0)).to(device)
        if spec.images and shown:
            features = _image_features(model, shown.pop("pixel_values").to(hidden), shown)
            hidden[is_image.to(device)] = torch.cat(list(features))
        else:
            hidden = hidden[~is_image.to(device)]
        embedded.append(hidden)
    vision.cpu()
    logger.info("%d samples, %d tokens to calibrate on", len(embedded), sum(map(len, embedded)))
    return embedded


def _image_features(model: Any, pixels: torch.Tensor, more: dict[str, torch.Tensor]) -> Any:
    """Return each image's features; here LLaVA-1.6's are not one picture yet."""
    how = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    layer = model.config.vision_feature_layer
    found = model.get_image_features(pixel_values=pixels, vision_feature_layer=layer, **how, **more)
    if "image_sizes" not in more:
        return found
    newline = model.image_newline
    return [model.pack_image_features(found, **more, **how, image_newline=newline)[0]]


def _tokenizer_files(merged: Path) -> dict[str, str]:
    """Return what says how a tokenizer of transformers 5 writes conversations and ends answers."""
    tree = json.loads((merged / "tokenizer_config.json").read_bytes())
    found = {"tokenizer_file": str(merged / "tokenizer.json")}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tree.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            found[name] = token
    template = merged / "chat_template.jinja"
    text = template.read_text("utf-8") if template.is_file() else tree.get("chat_template")
    return found | ({"chat_template": text} if isinstance(text, str) else {})


def _write(spec: AwqSpec, model: Any, merged: Path, out: Path) -> None:
    """Write weights, config, tokenizer and processor files."""
    writer = llava_folder.ShardWriter(out)
    for name, value in model.state_dict().items():
        if value.is_meta:
            continue  # The head of tied weights, which is the embedding.
        writer.add({name: value.half() if value.is_floating_point() else value})
    writer.finish()
    llava_folder.copy_sidecars(merged, out)
    config = old_config(merged)
    config["quantization_config"] = spec.quantization_config()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def main(task: Path, result: Path) -> None:
    """Quantize as a task file says, and write the peak of memory in bytes to the result file."""
    settings = json.loads(task.read_text(encoding="utf-8"))
    spec = AwqSpec.parse(settings["slug"])
    assert spec is not None
    calibration = Calibration(
        settings["dataset_uri"], settings["num_samples"], settings["system_prompt"]
    )
    merged, out = Path(settings["merged"]), Path(settings["out"])
    peak = quantize_with_autoawq(spec, merged, out, calibration, settings["device"])
    result.write_text(str(peak), encoding="utf-8")


if __name__ == "__main__":
    # To stdout, which the parent shares; stderr is kept for the reason of a failure.
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    with errors_in_one_line():
        main(*(Path(argument) for argument in sys.argv[1:]))
