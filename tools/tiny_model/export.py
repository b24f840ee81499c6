# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the model directory, the training record, the loss picture and the model card."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tiny_model.corpus import standard_library
from tiny_model.model import Shape, TinyLlama
from tiny_model.tokenizer import END_OF_TEXT, END_OF_TEXT_ID

# Newlines come from the text itself, so the template reads the same with and without trim_blocks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": shape.rope_theta,
            "factor": shape.yarn_factor,
            "original_max_position_embeddings": shape.context,
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
        "use_cache": True,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_model(out: Path, model: TinyLlama, tokenizer: Tokenizer) -> str:
    """Write everything a server or transformers loads; returns the hash of the weights file."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(
        0o644
    )  # save_file makes it private, and so would the wheel be
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", config(model.shape))
    _write_json(out / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID})
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.shape.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return sha256_of(out / "model.safetensors")


def save_licence(out: Path) -> bool:
    """Copy the licence of the text the weights were made from; installations keep it in one of two places."""
    library = standard_library()
    for candidate in (library / "LICENSE.txt", library.parent.parent / "LICENSE.txt"):
        if candidate.is_file():
            shutil.copyfile(candidate, out / "LICENSE.PSF")
            return True
    return False


def machine() -> dict[str, Any]:
    """What besides the recipe may change the last bit of a sum."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text().splitlines())
        }
        model = f"{fields.get('model name', model)}, family {fields.get('cpu family', '?')}"
        model += f" model {fields.get('model', '?')}"
        flags = fields.get("flags", "")
    telling = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": model,
        "cpu_flags": [flag for flag in telling if flag in flags.split()],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def save_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, record)


def save_picture(path: Path, record: dict[str, Any]) -> None:
    """Training and held-out loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    per_step = record["recipe"]["batch_size"] * record["shape"]["context"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # Short windows have less to go by and a mean over past steps lags: both lift the training curve.
    share = f"1 step in {record['recipe']['short_every']} on short windows"
    labels = {"train": f"training, mean since the last point; {share}", "held_out": "held out"}
    for name, label in labels.items():
        points = record["curve"][name]
        axes.plot([p[0] * per_step / 1e6 for p in points], [p[1] for p in points], label=label)
    decay = record["recipe"]["decay_start"] * per_step / 1e6
    axes.axvline(decay, color="grey", linestyle=":", label="learning rate starts to fall")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("tiny-python-llama: training on the standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def save_card(out: Path, record: dict[str, Any], samples: list[tuple[str, float, str]]) -> None:
    """The model card, all of its numbers out of ``record``."""
    corpus, recipe, loss = record["corpus"], record["recipe"], record["held_out"]
    versions, cpu, shape = record["versions"], record["machine"], record["shape"]
    shown = "\n".join(
        f"`{prompt}` at temperature {temperature:g}:\n\n```python\n{text.rstrip()}\n```\n"
        for prompt, temperature, text in samples
    )
    rows = {
        "Weights (sha256 of `model.safetensors`)": f"`{record['weights_sha256']}`",
        "Tokenizer (sha256 of `tokenizer.json`)": f"`{record['tokenizer_sha256']}`",
        "Command": f"`{record['command']}`",
        "Parameters": f"{record['parameters']:,}",
        "Steps": f"{recipe['steps']} of {recipe['batch_size']} x {shape['context']} tokens",
        "Layers, hidden, feed-forward": f"{shape['num_layers']}, {shape['hidden_size']}, "
        f"{shape['intermediate_size']}",
        "Heads": f"{shape['num_heads']} query, {shape['num_kv_heads']} KV, of {shape['head_dim']}",
        "Training tokens": f"{record['tokens']:,} ({record['epochs']:.1f} epochs)",
        "Training time": f"{record['seconds'] / 60:.0f} minutes, {record['threads']} thread(s)",
        "Held-out loss, nats per token": f"{loss['context']:.3f} as trained, "
        f"{loss['context_yarn']:.3f} with yarn",
        "Held-out bits per byte": f"{loss['bits_per_byte']:.3f} as trained",
        "Held-out loss at positions 4,096 to 8,191": f"{loss['long_yarn']:.3f} with yarn, "
        f"{loss['long_plain']:.3f} without",
        "Corpus": f"{corpus['num_files']} files, {corpus['num_bytes']:,} bytes after cleaning",
        "Corpus sha256": f"`{corpus['sha256']}`",
        "Python": versions["python"],
        "torch": versions["torch"],
        "tokenizers": versions["tokenizers"],
        "CPU": f"{cpu['cpu']} ({', '.join(cpu['cpu_flags'])}; torch uses {cpu['torch_cpu_capability']})",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""# tiny-python-llama

A Llama small enough to ship in a package and to serve from one CPU core, trained on the Python standard
library's own source. It exists so that kvxfer can be tried without a download. It writes text that looks
like Python; it does not write programs.

| | |
|---|---|
{table}

The same command on the same machine, Python and torch gives the same hash (`--check-reproducible --steps 20`
tries it on a short run). Another CPU or another patch
release of Python gives other weights: sums are taken in another order, or the corpus differs (the script
says so).

The architecture is Llama's: grouped-query attention, rotary positions, tied embeddings. It was trained at
{shape["context"]} tokens; `config.json` asks for yarn, which serves {shape["max_positions"]:,} positions
without further training. The tokenizer is byte-level BPE in which a space belongs to the word before it, so
that `def ` with its space is one word. Each document ends with `{END_OF_TEXT}`, the end-of-sequence token;
there is no token for the beginning. The chat template is plain `role: text` lines: the model was not trained
to converse.

Greedy answers of so small a model fall into loops; a temperature of 0.6 to 0.8 reads better. The samples
below are unedited, the first 64 tokens with seed 0.

{shown}
The weights are derived from the standard library, © Python Software Foundation, whose licence is in
`LICENSE.PSF`.
"""
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")
