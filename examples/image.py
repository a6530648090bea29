"""What is in an image, from a server started with --model demo-vision."""

from openai import OpenAI

RED_SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADwAAAA8AQMAAAAAMksxAAAABlBMVEX/////AADrWueTAAAAG0lEQVR42mNgGCSA8f/"
    "//z8YGJhg/JHMGCQAAHIKBDHcGlAxAAAAAElFTkSuQmCC"
)

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
content = [
    {"type": "image_url", "image_url": {"url": RED_SQUARE}},
    {"type": "text", "text": "What is in this image?"},
]
messages = [{"role": "user", "content": content}]
answer = client.chat.completions.create(model="demo-vision", messages=messages, temperature=0)
print(answer.choices[0].message.content)
