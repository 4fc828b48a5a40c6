"""Tokenizers as people bring them, made here in the likeness of families, each with its own peculiarities.

llama3_like(folder)     # byte-level BPE, BOS by the post-processor, three ends of which one ends a turn
gemma_like(folder)      # sentencepiece's manner, turns closed by a token that is not the eos_token
deepseek_like(folder)   # a tokenizer.json alone; a template that opens the thinking
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from r1hpc.tasks.problems.listed import TEMPLATE

LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = "a day" %}{%- else %}{%- set date_string = "a day" %}{%- endif %}{%- endif %}'
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}'
    '{{- "Today: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}'
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
_TEXTS = [
    TEMPLATE,
    "<think>carry 1</think><answer>57</answer>",
    "What is 23 + 34? system user assistant model",
]


def llama3_like(folder: Path) -> Path:
    _write(
        folder,
        _llama3(),
        LLAMA3_TEMPLATE,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
    )
    ids = [_llama3().token_to_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    _write_json(folder / "generation_config.json", {"eos_token_id": ids, "do_sample": True})
    return folder


def gemma_like(folder: Path) -> Path:
    _write(folder, _gemma(), GEMMA_TEMPLATE, bos="<bos>", eos="<eos>", pad="<pad>")
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)  # where newer transformers puts it
    _write_json(folder / "generation_config.json", {"eos_token_id": [1, 106]})
    return folder


def deepseek_like(folder: Path, tokenizer: Path) -> Path:
    made = Tokenizer.from_file(str(tokenizer))
    marks = {
        "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
    _write(folder, made, DEEPSEEK_TEMPLATE, **marks, pad="<\uff5c\u2581pad\u2581\uff5c>")
    return folder


@cache
def _llama3() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(_TEXTS, trainer)
    names = ("begin_of_text", "end_of_text", "eom_id", "eot_id", "start_header_id", "end_header_id")
    made.add_special_tokens([f"<|{name}|>" for name in (*names, "finetune_right_pad_id")])
    begin = "<|begin_of_text|>"
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
    )
    return made


@cache
def _gemma() -> Tokenizer:
    """Blanks are marks, what is not in the vocabulary is bytes, special tokens have the lowest ids."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(101))]
    special += ["<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    made.train_from_iterator([text.replace(" ", "\u2581") for text in _TEXTS], trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def _write(folder: Path, made: Tokenizer, template: str, *, bos: str, eos: str, pad: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    named = {
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, "special": True},
        "pad_token": pad,
    }
    _write_json(folder / "tokenizer_config.json", {**config, **named})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
