"""`model: tiny`: a Qwen3-shaped model of under one million parameters, made from the job's own text.

It lets the whole chain run in minutes on two CPU cores with nothing downloaded, and it is an ordinary
Hugging Face folder: every stage treats it as it would a real model. It starts from random weights, so a
job that names it needs a warm start.

The same texts and the same seed give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 2048
# The model's shape, apart from what the tokenizer decides. Plain data: a job is checked without torch.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")

# One piece per identifier ("E11.9", "T2DM", "ICD-10-CM"), so that what a job uses often becomes one token
# and answers stay short. In a list the space goes with the comma, so that an identifier is the same token
# in every place. One piece per digit of a bare number, so that arithmetic sees its digits.
IDENTIFIER = r"\p{L}+[-.]?\p{N}[\p{L}\p{N}]*(?:[-.][\p{L}\p{N}]+)*"
PIECES = rf", (?={IDENTIFIER})| ?{IDENTIFIER}| ?\p{{L}}+| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"

# ChatML as Qwen3 speaks it, without its thinking blocks. The `generation` marks are what TRL reads to
# train on the assistant's tokens only; the end-of-turn token is inside them, the newline after it is not.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {{- 'Reply <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = (message.content or []) | map(attribute='text') | join('') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- set function = call.function or call %}
                {%- if function.arguments is string %}
                    {%- set arguments = function.arguments %}
                {%- else %}
                    {%- set arguments = function.arguments | tojson %}
                {%- endif %}
                {{- '<tool_call>{"name": "' + function.name + '", "arguments": ' }}
                {{- arguments + '}</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tiny(texts: Iterable[str], out: Path, seed: int) -> None:
    """Write tokenizer and model, trained on `texts` and randomly initialised, to the folder `out`.

    The caller's random state is left as it was.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = train_tokenizer(texts)
    config = Qwen3Config(
        **SHAPE,
        vocab_size=vocabulary_rows(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def vocabulary_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding: a whole multiple of 64, whatever the text yielded, keeps the matrix aligned."""
    return -(-len(tokenizer) // 64) * 64


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` tokens with the chat template on it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes: any text encodes, also text that the job never showed.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The role names and the template's own words are text that every prompt holds.
    frame = [f"{role}\n" for role in ("system", "developer", "user", "assistant", "tool")] * 2
    tokenizer.train_from_iterator([*frame, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
