"""One LoRA training step on a CPU: this package, an earlier commit of it, and Hugging Face transformers
with peft; same model, documents and optimizer."""
import argparse
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Callable

import numpy as np

RANK, SCALING, LR, DECAY, MAX_NORM = 16, 2.0, 1e-4, 0.1, 1.0
WANTED_PADDED, WANTED_PACKED, WANTED_MEMORY, MEMORY_STEPS = 3.0, 1.5, 0.5, 3
SHAPE = dict(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    intermediate_size=1792, vocab_size=32768, model_type="mistral", rms_norm_eps=1e-5, rope_theta=1e6,
    sliding_window=None, tie_word_embeddings=False,
)
TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=128,
    vocab_size=1024,
)
ENV = dict(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore",
           HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
MIXTURE = dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, intermediate_size=512)
HF_LAYERS = dict(wq="self_attn.q_proj", wk="self_attn.k_proj", wv="self_attn.v_proj", wo="self_attn.o_proj",
                 w1="mlp.gate_proj", w2="mlp.down_proj", w3="mlp.up_proj")
Step = Callable[[], float]


def config(tiny: bool, moe: bool = False) -> dict:
    "The shape of the model, as in a Hugging Face config."
    return SHAPE | (MIXTURE if moe else {}) | (TINY if tiny else {})


def make_batch(docs: int, vocab: int, seed: int = 0):
    """About 150 tokens a document, of unequal lengths, in one packed row; a prompt of 30 to 70 % of each
    is not trained."""
    from mistral_nb.data import pack, tokens
    rng = np.random.RandomState(seed)
    raw = rng.lognormal(0, 0.8, docs)
    samples = []
    for n in np.maximum(16, raw / raw.sum() * 150 * docs).astype(int):
        mask = np.arange(n + 1) >= int(n * rng.uniform(0.3, 0.7))
        samples.append(tokens.TokenSample(rng.randint(3, vocab, n + 1).astype(np.int32), mask))
    return pack.pack_samples([samples], sum(len(s) - 1 for s in samples))


def make_folder(folder: Path, shape: dict, peers: bool) -> None:
    "A model with random weights, in Hugging Face's layout if that is there, and the adapter's start values."
    import torch
    from mistral_nb.model import args, lora, weights
    if peers:
        from transformers import MistralConfig, MistralForCausalLM
        torch.manual_seed(0)
        MistralForCausalLM(MistralConfig(**shape)).save_pretrained(folder)
    else:
        own = args.from_hf(shape)
        weights.save_model(weights.init_model(own).state_dict(), own, folder)
    model = lora.add_adapters(weights.load_model(folder), RANK, SCALING)
    lora.init_lora(model, 0)
    weights.save_tensors(lora.adapter_state(model), folder / "start.safetensors")


def build_ours(folder: Path, batch) -> tuple[object, Step]:
    "This package's step."
    from safetensors.torch import load_file
    from mistral_nb.model import lora, weights
    from mistral_nb.train import checkpoint, loop, optim
    model = lora.add_adapters(weights.load_model(folder), RANK, SCALING)
    lora.load_adapter_state(model, load_file(folder / "start.safetensors"))
    optimizer = optim.adamw(checkpoint.trainable_params(model).values(), LR, DECAY)
    return model, lambda: loop.train_step(model, [batch], optimizer, MAX_NORM)[0]


def hf_model(folder: Path):
    "The same model and adapter in transformers and peft."
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import MistralForCausalLM
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    targets = [name.split(".")[1] for name in HF_LAYERS.values()]
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK * SCALING, lora_dropout=0.0, target_modules=targets)
    ).train()
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(
            folder / "start.safetensors"
        ).items():  # layers.0.attention.wq.lora_A.weight
            _, i, _, layer, part, _ = name.split(".")
            params[f"base_model.model.model.layers.{i}.{HF_LAYERS[layer]}.{part}.default.weight"].copy_(value)
    return model


def packed_inputs(batch) -> dict:
    "One row: a dense additive mask that is block-diagonal and causal, positions from 0 in every document."
    import torch
    from mistral_nb.model.attention import packed_mask
    x, y, mask = map(torch.from_numpy, (batch.x, batch.y, batch.mask))
    dense = torch.zeros(1, 1, len(x), len(x)).masked_fill_(
        ~packed_mask(batch.seqlens), torch.finfo(torch.float32).min
    )
    labels = y.masked_fill(~mask, -100)[None]
    at = torch.cat([torch.arange(n) for n in batch.seqlens])[None]
    return dict(input_ids=x[None], position_ids=at, attention_mask=dense, labels=labels, shift_labels=labels)


def padded_inputs(batch) -> dict:
    "One document a row, padded on the right."
    import torch
    from torch.nn.utils.rnn import pad_sequence
    x, y, mask = map(torch.from_numpy, (batch.x, batch.y, batch.mask))
    def rows(t, pad):
        return pad_sequence(
            list(t.split(list(batch.seqlens))), batch_first=True, padding_value=pad
        )
    labels = rows(y.masked_fill(~mask, -100), -100)
    return dict(
        input_ids=rows(x, 0), attention_mask=rows(torch.ones_like(x), 0), labels=labels, shift_labels=labels
    )


def build_peer(folder: Path, inputs: dict) -> tuple[object, Step]:
    "Hugging Face's step: logits and loss of all positions, clipping, the same AdamW."
    import torch
    from mistral_nb.train import optim
    model = hf_model(folder)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.adamw(params, LR, DECAY)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return loss.item()

    return model, step


BUILD = {
    "ours, packed": build_ours,
    "HF, packed": lambda folder, batch: build_peer(folder, packed_inputs(batch)),
    "HF, padded": lambda folder, batch: build_peer(folder, padded_inputs(batch)),
}


def memory(variant: str, folder: Path, batch) -> dict:
    "Peak memory of a few steps in this process, in MiB: above model and optimizer, and in all."
    import torch
    torch.set_num_threads(1)
    model, step = BUILD[variant](folder, batch)
    for p in model.parameters(): p.detach().sum()  # weights mapped from a file count as resident from here on
    gc.collect()
    try: Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    except OSError: pass
    before = resident()
    for _ in range(MEMORY_STEPS): step()
    return dict(extra=peak() - before, peak=peak())


def peak() -> float:
    "Highest resident memory of this process so far, MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def resident() -> float:
    "Resident memory of this process now, MiB."
    try: return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError: return peak()


def timed(step: Step) -> Callable[[], tuple[float, float]]:
    "The step with its CPU seconds behind the loss."
    def run() -> tuple[float, float]:
        began = time.process_time()
        return step(), time.process_time() - began
    return run


def timings(built: dict[str, Callable[[], tuple[float, float]]], steps: int) -> tuple[dict, dict]:
    "CPU seconds and losses of each step, the variants in turn, after one warm-up step each."
    variants = list(built)
    seconds, losses = {v: [] for v in variants}, {v: [built[v]()[0]] for v in variants}
    for i in range(steps):
        for v in variants if i % 2 else variants[::-1]:
            loss, took = built[v]()
            losses[v].append(loss)
            seconds[v].append(took)
    return seconds, losses


SERVE = """import json, sys, time
from pathlib import Path
import step, torch
torch.set_num_threads(1)
vocab_size = step.config(sys.argv[3] == "True")["vocab_size"]
run = step.build_ours(Path(sys.argv[1]), step.make_batch(int(sys.argv[2]), vocab_size))[1]
for line in sys.stdin:
    began = time.process_time()
    print(json.dumps([run(), time.process_time() - began]), flush=True)
"""


def checkout(revision: str, folder: Path) -> Path:
    "The files of a commit of this repository."
    root = Path(__file__).resolve().parents[1]
    packed = subprocess.run(["git", "archive", revision], cwd=root, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar: tar.extractall(folder / "earlier", filter="data")
    return folder / "earlier"


def env_of(tree: Path) -> dict[str, str]:
    "The environment in which `tree` is the package."
    return os.environ | ENV | {"PYTHONPATH": f"{tree}/benchmarks:{tree}"}


def build_earlier(tree: Path, folder: Path, options: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    "The step of the files in `tree`, in a process of its own that does one when it is asked."
    command = [sys.executable, "-c", SERVE, str(folder), str(options.docs), str(options.tiny)]
    served = subprocess.Popen(
        command, env=env_of(tree), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def step() -> tuple[float, float]:
        print(file=served.stdin, flush=True)
        return tuple(json.loads(served.stdout.readline()))

    return step


EARLIER = "ours, earlier"


def child(part: str, folder: Path, options: argparse.Namespace) -> dict:
    "What a process of its own prints for a part of the work."
    passed = ["--docs", str(options.docs), "--steps", str(options.steps)] + ["--tiny"] * options.tiny
    tree = folder / "earlier" if part == EARLIER else Path(__file__).resolve().parents[1]
    if part == EARLIER: part = "ours, packed"
    else: passed += ["--against", options.against] * bool(options.against) + ["--moe"] * options.moe
    command = [
        sys.executable, str(tree / "benchmarks/step.py"), "--part", part, "--folder", str(folder),
        *passed,
    ]
    done = subprocess.run(command, env=env_of(tree), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_part(options: argparse.Namespace, peers: bool) -> dict:
    "The work of a child process."
    if options.part == "make":
        return make_folder(options.folder, config(options.tiny, options.moe), peers) or {}
    batch = make_batch(options.docs, config(options.tiny)["vocab_size"])
    if options.part != "time": return memory(options.part, options.folder, batch)
    import torch
    torch.set_num_threads(1)
    built = {v: timed(BUILD[v](options.folder, batch)[1]) for v in BUILD if peers or not v.startswith("HF")}
    if options.against: built[EARLIER] = build_earlier(options.folder / "earlier", options.folder, options)
    seconds, losses = timings(built, options.steps)
    return dict(seconds=seconds, losses=losses)


def report(variants: list[str], batch, used: dict, timed: dict) -> tuple[float, float, float]:
    "Print the table; returns the ratios of speed to both peers, and of memory to the packed one."
    from mistral_nb.core.display import Table
    real = len(batch.x)
    cost = {v: median(timed["seconds"][v]) for v in variants}
    first = {v: timed["losses"][v][0] for v in variants}
    extra = {v: used[v]["extra"] for v in variants}
    def times(to, v): return round(cost[to] / cost[v], 2) if to in cost else "-"
    rows = []
    for v in variants:
        share = round(extra[v] / extra["HF, packed"], 2) if "HF, packed" in extra else "-"
        rows.append(
            [
                v, real, round(cost[v], 2), int(real / cost[v]), times("HF, padded", v),
                times("HF, packed", v), int(extra[v]), share, int(used[v]["peak"]), f"{first[v]:.6f}",
            ]
        )
    head = (
        "variant,tokens,CPU s/step,tokens/CPU s,x HF padded,x HF packed,extra MiB,of HF packed,"
        "peak MiB,first loss"
    ).split(
        ","
    )
    print(Table(head, rows))
    if "HF, packed" not in variants: return 0.0, 0.0, 0.0
    apart = max(
        abs(a - b) for v in variants for a, b in zip(timed["losses"][v], timed["losses"][variants[0]])
    )
    print(f"\nlosses of all {len(timed['losses'][v])} steps differ by at most {apart:.1e}")
    assert max(first.values()) - min(first.values()) <= 1e-5, f"the first losses differ: {first}"
    return (
        cost["HF, padded"] / cost["ours, packed"], cost["HF, packed"] / cost["ours, packed"],
        extra["ours, packed"] / extra["HF, packed"],
    )


def main() -> int:
    "Measure, print, and return 1 if a target is missed."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--docs", type=int, default=10, help="documents, about 150 tokens each")
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run; its ratios are not judged")
    parser.add_argument(
        "--moe", action="store_true", help="a mixture of 8 experts of which 2 compute; without peers"
    )
    parser.add_argument(
        "--against", metavar="COMMIT", help="an earlier commit to measure beside this one, for example HEAD~1"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers = not options.moe and all(find_spec(name) for name in ("transformers", "peft"))
    if options.part: return print(json.dumps(run_part(options, peers))) or 0
    if not (peers or options.moe):
        print("transformers or peft is not installed: only this package is measured\n")
    variants = [v for v in BUILD if peers or not v.startswith("HF")] + [EARLIER] * bool(options.against)
    batch = make_batch(options.docs, config(options.tiny)["vocab_size"])
    longest = max(batch.seqlens)
    print(
        f"{len(batch.seqlens)} documents of {min(batch.seqlens)} to {longest} tokens, {len(batch.x)} in all, "
        f"{batch.trained} trained; "
        f"padded {longest * len(batch.seqlens)}; float32, one thread, {options.steps} steps\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child("make", folder, options)
        if options.against: checkout(options.against, folder)
        used = {v: child(v, folder, options) for v in variants}
        took = child("time", folder, options)
    padded, packed, share = report(variants, batch, used, took)
    if not peers: return 0
    print(f"speed ratio to HF padded: {padded:.2f} (wanted >= {WANTED_PADDED})")
    print(f"speed ratio to HF packed: {packed:.2f} (wanted >= {WANTED_PACKED})")
    print(f"memory ratio to HF packed: {share:.2f} (wanted <= {WANTED_MEMORY})")
    return int(
        not options.tiny and (padded < WANTED_PADDED or packed < WANTED_PACKED or share > WANTED_MEMORY)
    )


if __name__ == "__main__": sys.exit(main())
