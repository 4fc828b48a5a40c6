# mypy: ignore-errors
"""Make what real scripts load by name: tiny models, tokenizers and data sets, in the folder they start in.

python -m tests.script.real.inputs FOLDER
"""

import json
import random
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(80)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def main() -> None:
    folder = Path(sys.argv[1])
    make_models(folder)
    make_data(folder, random.Random(1))


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>", "user", "assistant"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = Tokenizer.from_str(plain.to_str())
    pair.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    encoder = PreTrainedTokenizerFast(
        tokenizer_object=pair, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", **names
    )
    decoder = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", **names)
    letters = ["[PAD]", "[UNK]", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>", **names)
    qwen.chat_template = TEMPLATE
    small = {"vocab_size": len(letters), "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16}
    for name, model, tokenizer in (
        ("bert-base-cased", transformers.BertForMaskedLM(transformers.BertConfig(**small, **heads)), encoder),
        (
            "tiny-gpt2",
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=len(vocabulary),
                    n_positions=128,
                    n_embd=32,
                    n_layer=2,
                    n_head=2,
                    bos_token_id=5,
                    eos_token_id=5,
                    pad_token_id=0,
                )
            ),
            decoder,
        ),
        (
            "tiny-qwen2",
            transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(
                    **small, **heads, num_key_value_heads=2, eos_token_id=2, pad_token_id=0
                )
            ),
            qwen,
        ),
        (
            "tiny-t5",
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=len(vocabulary),
                    **sizes,
                    decoder_start_token_id=0,
                    eos_token_id=5,
                    pad_token_id=0,
                )
            ),
            decoder,
        ),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reward = transformers.Qwen2ForSequenceClassification.from_pretrained(folder / "tiny-qwen2", num_labels=1)
    reward.save_pretrained(folder / "tiny-reward")
    qwen.save_pretrained(folder / "tiny-reward")


def make_data(folder: Path, dice: random.Random) -> None:
    def text(low: int = 4, high: int = 12) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(low, high)))

    def rows(count: int, make) -> list[dict]:
        return [make(number) for number in range(count)]

    glue = {"sentence1": text, "sentence2": text}
    for split, count in (("train", 320), ("validation", 32), ("test", 16)):
        lines(
            folder / f"nyu-mll/glue/mrpc/{split}.jsonl",
            rows(count, lambda n: {k: f() for k, f in glue.items()} | {"label": n * 7 % 3 % 2, "idx": n}),
        )
    card = "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
    card += "".join(f"  - split: {s}\n    path: mrpc/{s}.jsonl\n" for s in ("train", "validation", "test"))
    (folder / "nyu-mll/glue/README.md").write_text(card + "---\n")
    (folder / "train.txt").write_text("\n".join(text(20, 40) for _ in range(300)))
    (folder / "valid.txt").write_text("\n".join(text(20, 40) for _ in range(30)))
    sets = {
        "sft": lambda n: {"text": text(8, 16)},
        "chat": lambda n: {"messages": [message("user", text()), message("assistant", text())]},
        "preference": lambda n: {"prompt": text(), "chosen": text(), "rejected": text()},
        "unpaired": lambda n: {"prompt": text(), "completion": text(), "label": n % 3 == 0},
        "prompt": lambda n: {"prompt": text()},
        "classified": lambda n: {"sentence": text(), "label": str(n % 2)},
        "translated": lambda n: {"translation": {"en": text(), "ro": text()}},
        "summarized": lambda n: {"text": text(), "summary": text(2, 4)},
        "tagged": lambda n: {
            "tokens": (words := text().split()),
            "ner_tags": [f"T{len(w) % 2}" for w in words],
        },
        "chosen": lambda n: {
            "video-id": "",
            "fold-ind": "",
            "startphrase": "",
            "sent1": text(),
            "sent2": text(2, 3),
            "gold-source": "",
            "ending0": text(),
            "ending1": text(),
            "ending2": text(),
            "ending3": text(),
            "label": n % 4,
        },
        "answered": lambda n: answered(str(n), text(12, 20)),
    }
    for name, make in sets.items():
        for split, count in (("train", 96), ("test", 12)):
            lines(folder / f"{name}/{split}.json", rows(count, make))
    for name in ("accuracy", "glue", "seqeval", "rouge", "sacrebleu", "squad"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{name}.py").write_text(METRIC)


METRIC = '''"""A metric that stands for one of the hub's: the share of equal values."""
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="", citation="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, **more):
        share = sum(a == b for a, b in zip(predictions, references)) / len(predictions)
        return {"accuracy": share, "f1": share}
'''


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def answered(name: str, context: str) -> dict:
    answer = context.split()[3]
    return {
        "id": name,
        "context": context,
        "question": "w1 w2",
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }


def lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
