"""Greedy text of an exported language model with onnxruntime, tokenizers and NumPy alone.

This file stands in the card of every export, to be copied; all other uses: common/export/onnx_generation.py.
"""

import json
import sys
from pathlib import Path

import numpy as np


def decode(folder: str, prompt: str, new_tokens: int = 64) -> str:
    """What the model in an exported folder writes after a prompt, which stands in front of it."""
    import onnxruntime
    from tokenizers import Tokenizer

    about = json.loads(Path(folder, "config.json").read_text())["onnx"]
    session = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")))
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    shapes = {item.name: item.shape for item in session.get_inputs()}
    size = {"rows": 1, "past": 0}
    past = {  # the order of the inputs is that of the outputs behind the logits
        name: np.zeros([size.get(n, n) for n in shape], np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_")
    }
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    todo, seen, last = list(ids), 0, len(ids) + new_tokens
    while True:
        if seen == about["context"] and not about["segmented"]:
            break  # no room is left
        begins = seen in (0, about["context"])  # a segment: its past goes to the memory, if there is one
        if begins and "new_segment" not in shapes:
            past, seen = {name: value[..., :0, :] for name, value in past.items()}, 0
        place = 0 if begins else seen
        now, todo = todo[: about["context"] - place], todo[about["context"] - place :]
        feeds = past | {
            "input_ids": np.array([now]),
            "attention_mask": np.ones((1, seen + len(now)), np.int64),
            "position_ids": place + np.arange(len(now))[None],
            "num_logits_to_keep": np.array(1),
            "new_segment": np.array([int(begins)]),
        }
        logits, *present = session.run(None, {name: feeds[name] for name in shapes})
        past, seen = dict(zip(past, present, strict=True)), place + len(now)
        if begins:  # what came before it is in the memory now
            past = {
                name: value[..., -seen:, :] if "past" in shapes[name] else value
                for name, value in past.items()
            }
        if not todo:
            token = int(logits[0, -1].argmax())
            if token == about["end"] or len(ids) == last:
                break
            ids, todo = [*ids, token], [token]
    return str(tokenizer.decode(ids))


if __name__ == "__main__":
    print(decode(sys.argv[1], sys.argv[2]))  # python decode.py FOLDER "a prompt"
