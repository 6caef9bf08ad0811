"""One case of make.py in vLLM: `ask.py FOLDER` prints what it measured as JSON; it runs in vLLM's venv."""
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

ALLOWED = {"gptq": 0.1, "awq": 0.1, "fp8": 0.5}  # 16-bit products; fp8 rounds inputs too
OWN = dict(tokenizer_mode="mistral", config_format="mistral", load_format="mistral")


def main(place: Path) -> None:
    "Load, ask, compare"
    case = json.loads((place / "case.json").read_text())
    exact = case["format"] in ("hf", "mistral", "peft")
    how = dict(dtype="float32" if exact else "auto")  # packed ones compute in 16 bits
    if case["format"] == "mistral": how |= OWN
    adapter = None
    if case["format"] == "peft":
        how |= dict(enable_lora=True, max_lora_rank=8)
        adapter = LoRARequest("tuned", 1, case["folder"])
    llm = LLM(case["base"] if adapter else case["folder"], enforce_eager=True, max_model_len=64, seed=0,
              max_num_seqs=4, **how)
    asked = SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    prompts = [dict(prompt_token_ids=ids) for ids in case["ids"]]
    found = llm.generate(prompts, asked, lora_request=adapter, use_tqdm=False)
    apart = max(
        abs(at[i].logprob - p) for out, ids, likely in zip(found, case["ids"], case["likely"])
        for at, i, p in zip(out.prompt_logprobs[1:], ids[1:], likely)
    )
    said = [list(out.outputs[0].token_ids) for out in found]
    chats = llm.chat(case["chats"], SamplingParams(max_tokens=1), lora_request=adapter, use_tqdm=False)
    print("\n" + json.dumps({
        "apart": apart, "allowed": 1e-3 if exact else ALLOWED[case["format"]], "asked": len(said),
        "answers": sum(a == b for a, b in zip(said, case["answers"])),
        "chats": sum(out.prompt_token_ids == ids for out, ids in zip(chats, case["ids"])),
    }))


if __name__ == "__main__": main(Path(sys.argv[1]))
