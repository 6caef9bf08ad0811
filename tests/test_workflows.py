"""Three ways that people know from elsewhere, from end to end on a small model in real formats."""
import json
import subprocess

import pandas
import pytest
import yaml

transformers = pytest.importorskip("transformers")
import torch

from conftest import train_command
from hub import python, running_hub
from inference_cpu import mistral_inference_on_cpu
from mistral_nb.cli import main
from mistral_nb.data.convert import convert
from mistral_nb.data.tokens import load_tokenizer
from mistral_nb.demo import foreign_rows
from mistral_nb.export.certificate import chat_ids, greedy_ids, live_logits
from mistral_nb.export.exports import calibration_samples, export_model, mean_loss_of
from mistral_nb.infer.chat import Chat, load_tuned
from mistral_nb.train.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def run(command: list[str], env: dict) -> str:
    "What a program prints; it must succeed"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_readme_of_mistral_finetune(demo, tmp_path, shell_env, capsys):
    "Chats and tool calls from parquet, checked, trained by their YAML, asked in mistral-inference"
    rows, files = foreign_rows(30, seed=3), []
    for name in ("ultrachat", "glaive"):
        pandas.DataFrame(rows[name]).to_parquet(tmp_path / f"{name}.parquet")
        done = convert(tmp_path / f"{name}.parquet", to=tmp_path / f"{name}.jsonl")
        assert done.format == name and all(row["reason"] for row in done.refused)
        assert done.kept + len(done.refused) == 30
        files.append(str(tmp_path / f"{name}.jsonl"))
    config = tmp_path / "7B.yaml"
    config.write_text(yaml.safe_dump({
        "data": {"instruct_data": ",".join(files), "data": "", "eval_instruct_data": files[0]},
        "model_id_or_path": str(demo / "model"), "lora": {"rank": 64}, "seq_len": 1024, "batch_size": 1,
        "max_steps": 6, "optim": {"lr": 1e-3, "weight_decay": 0.1, "pct_start": 0.05}, "seed": 0,
        "log_freq": 1, "eval_freq": 3, "no_eval": False, "ckpt_freq": 3, "save_adapters": True,
        "run_dir": str(tmp_path / "run"),
    }))
    assert main(["check", str(config)]) == 0
    assert "ultrachat.jsonl" in capsys.readouterr().out
    run(train_command(config), shell_env)
    folder = tmp_path / "run/checkpoints/checkpoint_000006/consolidated"
    question = [{"role": "user", "content": "What does an apple cost?"}]
    tokenizer = load_tokenizer(demo / "model")
    ids = chat_ids(tokenizer, question)
    with mistral_inference_on_cpu():
        from mistral_inference.generate import generate
        from mistral_inference.transformer import Transformer
        theirs = Transformer.from_folder(demo / "model", device="cpu", dtype=torch.float32)
        theirs.load_lora(folder / "lora.safetensors")
        (answer,), _ = generate([ids], theirs, max_tokens=8, temperature=0.0, eos_id=2)
    mine = greedy_ids(load_tuned(demo / "model", folder).float(), [ids], len(answer))[0][len(ids):]
    assert answer == mine


def test_code_instructions(demo, tmp_path, shell_env):
    "Instruction rows, a base in nf4 with float16, trained, asked, merged, and pushed"
    pandas.DataFrame(foreign_rows(60, seed=4)["alpaca"]).to_csv(tmp_path / "code.csv", index=False)
    done = convert(tmp_path / "code.csv", to=tmp_path / "train.jsonl")
    assert done.format == "alpaca" and done.kept + len(done.refused) == 60
    trainer = Trainer(
        model_id_or_path=str(demo / "model"), data={"instruct_data": str(tmp_path / "train.jsonl")},
        run_dir=str(tmp_path / "run"), quantize="nf4", dtype="float16", lora={"rank": 16}, seq_len=512,
        max_steps=6, optim={"lr": 2e-3},
    )
    history = trainer.fit()
    assert history.records[-1].loss < history.records[0].loss
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    question = first["messages"][0]["content"]
    before = Chat(trainer.run.model, trainer.run.base.tokenizer, max_tokens=8).ask(question).text
    made = export_model(tmp_path / "run", "hf", tmp_path / "merged")
    assert any("the one trained on, in nf4" in note for note in made.certificate.notes)
    tok = transformers.AutoTokenizer.from_pretrained(made.folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    asked = tok.apply_chat_template([{"role": "user", "content": question}], return_tensors="pt")
    said = theirs.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked.input_ids.shape[1]:]
    assert tok.decode(said, skip_special_tokens=True).strip() == before.strip()
    with running_hub() as hub:
        code = f"from mistral_nb import push; push({str(made.folder)!r}, 'me/code')"
        sent = python(code, hub, shell_env, tmp_path)
        assert sent.returncode == 0, sent.stderr
        assert {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= set(hub.state["files"])
        assert hub.state["private"] is True


def test_quantization(demo, tmp_path):
    "Trained on a base of 4 bits, rounded to 4 bits with its own rows, and loaded by another program"
    pytest.importorskip("compressed_tensors")
    run_dir, data = tmp_path / "run", str(demo / "data/train.jsonl")
    trainer = Trainer(
        model_id_or_path=str(demo / "model"), run_dir=str(run_dir), quantize="nf4", seq_len=512, max_steps=20,
        data={"instruct_data": data}, lora={"rank": 16}, optim={"lr": 3e-3},
    )
    trainer.fit()
    made = trainer.export("gptq", tmp_path / "packed", kind="w4a16")
    note = next(n for n in made.certificate.notes if n.startswith("loss on"))
    whole, nearest, packed = (float(w) for w in note.replace(",", "").split() if w.count(".") == 1)
    assert packed < nearest and packed < whole + 0.5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    samples, _ = calibration_samples(data, trainer.run.base.tokenizer)
    with torch.no_grad(): logits = [theirs(torch.tensor([s.tokens.tolist()])).logits[0] for s in samples]
    mine = live_logits(trainer.run.model, [s.tokens.tolist() for s in samples])
    assert abs(mean_loss_of(logits, samples) - mean_loss_of(mine, samples)) < 0.5
    assert json.loads((made.folder / "config.json").read_text())["quantization_config"]
