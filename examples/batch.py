"""A batch file: written, answered without a server, and read."""

import json
import subprocess
from pathlib import Path

words = ["galaxy", "persimmon", "river"]
requests = [
    {
        "custom_id": word,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": f"What does {word} mean?"}], "temperature": 0},
    }
    for word in words
]
Path("requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))

subprocess.run(["persimmon", "generate", "requests.jsonl", "answers.jsonl"], check=True)

# Answers come in the order in which they finish.
answers = {answer["custom_id"]: answer for answer in map(json.loads, Path("answers.jsonl").read_text().splitlines())}
for word in words:
    print(answers[word]["response"]["body"]["choices"][0]["message"]["content"])
