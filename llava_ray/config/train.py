"""The train section of the config, its keys beside LLaVA's flags."""

from typing import Literal

from pydantic import Field, model_validator

from llava_ray.config.section import Count, Integer, Natural, NotNegative, Positive, Section, Share

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainConfig(Section):
    """LoRA fine-tuning. LLaVA's flag stands in brackets where its name differs."""

    method: Literal["lora", "qlora", "hqq", "full"] = Field(default="lora")
    """`qlora` keeps the base in 4-bit nf4 [bits=4], `hqq` in HQQ's low bits, whose loss LoRA then
    recovers; `full` trains every weight."""
    hqq_bits: Literal[8, 4, 3, 2, 1] = Field(default=2)
    """The bits of the base under method=hqq."""
    hqq_group_size: Literal[16, 32, 64, 128, 256] = Field(default=64)
    """Weights that share a scale and zero point under method=hqq."""
    num_workers: Count | None = Field(default=None)
    """Default: one for each GPU that the cluster can have, or one CPU worker."""
    cpus_per_worker: Positive | None = Field(default=None)
    """Default: 4 beside a GPU, else the CPUs that stay free, shared by the workers."""
    zero_stage: Literal["auto", 0, 2, 3] = Field(default="auto")
    """DeepSpeed's [deepspeed zero2.json, zero3.json]; 0 trains without DeepSpeed, every worker
    holding all. `auto`: 2 where several workers share the optimizer's state, and for offload and
    fp16; 0 for one worker, where DeepSpeed costs time and saves no memory (README's training
    table)."""
    offload: Literal["none", "optimizer", "optimizer+weights"] = Field(default="none")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(default="auto")
    """`auto`: bf16 on GPUs, fp32 on CPUs."""
    lora_r: Count = Field(default=48)
    lora_alpha: Positive = Field(default=256)
    lora_dropout: Share = Field(default=0.05)
    lora_targets: tuple[str, ...] = Field(default=LINEAR_LAYERS)
    """Linear layers of the language model, by the last part of their names."""
    use_dora: bool = Field(default=False)
    use_rslora: bool = Field(default=False)
    learning_rate: Positive = Field(default=2e-4)
    projector_learning_rate: NotNegative = Field(default=2e-5)
    """[mm_projector_lr]; 0 freezes the projector."""
    optimizer: Literal["adamw", "adamw8bit", "galore"] = Field(default="adamw")
    """[optim] `adamw8bit` is bitsandbytes', `galore` needs llava_ray[galore] and method=full. Both
    need zero_stage=0, and change weights without an fp32 copy of them."""
    galore_rank: Count = Field(default=128)
    galore_update_steps: Count = Field(default=200)
    """Steps between two projections [update_proj_gap]."""
    galore_scale: Positive = Field(default=0.25)
    weight_decay: NotNegative = Field(default=0.0)
    max_grad_norm: Positive = Field(default=1.0)
    warmup_ratio: Share = Field(default=0.03)
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(default="cosine")
    """[lr_scheduler_type]"""
    epochs: Positive = Field(default=1)
    """[num_train_epochs]"""
    max_steps: Count | None = Field(default=None)
    """Stops earlier than `epochs` where it is smaller."""
    batch_size: Count = Field(default=1)
    """Samples per worker and step [per_device_train_batch_size]."""
    eval_batch_size: Count = Field(default=4)
    """[per_device_eval_batch_size]"""
    gradient_accumulation: Count = Field(default=1)
    """[gradient_accumulation_steps]"""
    max_length: Count = Field(default=2048)
    """Tokens a sample may have, image tokens counted in [model_max_length]."""
    gradient_checkpointing: bool | Literal["mlp"] = Field(default=False)
    """Less memory for more time. `mlp` computes only the feed-forward halves again, for about half
    of both (whole layers where `fused_layers` does not apply)."""
    fused_layers: bool = Field(default=True)
    """Faster LoRA layers with the same results; for method=lora without DoRA."""
    group_by_modality_length: bool = Field(default=True)
    loader_workers: Natural | None = Field(default=None)
    """Processes that decode images beside each worker [dataloader_num_workers]. Default: 4 beside
    a GPU, which would else wait for images, and none on CPUs."""
    log_every_steps: Count = Field(default=1)
    """[logging_steps]"""
    eval_every_steps: Count | None = Field(default=None)
    """Default: at the end."""
    checkpoint_every_steps: Count | None = Field(default=None)
    """[save_steps]; default: ten times a run."""
    checkpoints_kept: Count = Field(default=1)
    """[save_total_limit]"""
    max_failures: Natural = Field(default=3)
    """How often a lost worker is replaced before the run fails."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",)
    )
    seed: Integer = Field(default=0)
    resume_from: str | None = Field(default=None, pattern=r"^adapter-[0-9a-f]+$")
    """Id of a training that was cut off under another version of code or libraries: start from its
    last checkpoint [resume_from_checkpoint]."""

    @property
    def runs_fused(self) -> bool:
        """Whether layers run with a backward of their own, where the model's are plain LLaMA's."""
        return self.fused_layers and self.method == "lora"

    def stage_for(self, num_workers: int) -> Literal[0, 2, 3]:
        """Return what `zero_stage` comes to with so many workers."""
        if self.zero_stage != "auto":
            return self.zero_stage
        alone = num_workers == 1 and self.offload == "none" and self.precision != "fp16"
        return 0 if alone or self.optimizer != "adamw" else 2

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        stage = self.zero_stage
        if self.use_dora and stage == 3:
            raise ValueError("use_dora needs zero_stage=2: DoRA reads whole weights")
        if self.method in ("qlora", "hqq") and stage == 3:
            raise ValueError(
                f"method={self.method} needs zero_stage=2: packed weights cannot be sharded"
            )
        if self.optimizer != "adamw" and stage not in ("auto", 0):
            raise ValueError(
                f"optimizer={self.optimizer} needs zero_stage=0: ZeRO flattens weights into "
                "pieces, and this optimizer's state belongs to whole ones"
            )
        if self.optimizer == "galore" and self.method != "full":
            raise ValueError("optimizer=galore needs method=full: LoRA's matrices are of low rank")
        if stage == 0 and self.offload != "none":
            raise ValueError(f"offload={self.offload} needs zero_stage=2 or 3: DeepSpeed offloads")
        if stage == 0 and self.precision == "fp16":
            raise ValueError("precision=fp16 needs zero_stage=2 or 3: DeepSpeed scales the loss")
        return self
