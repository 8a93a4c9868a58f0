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
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

VOCABULARY = 1024
CONTEXT = 2048
HEADS = 4
HEAD_DIM = 32
ROPE_THETA = 1000.0
LOCAL_LAYERS = 2
# The model's shape, apart from what the tokenizer decides. Plain data: a job is checked without torch.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": HEAD_DIM,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    # 1 / sqrt(hidden_size): the usual 0.02 is meant for wide models and costs this one hundreds of steps.
    "initializer_range": 0.088,
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
    for layer in model.model.layers[:LOCAL_LAYERS]:
        look_at_neighbours(layer.self_attn)
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


def look_at_neighbours(attention: Qwen3Attention) -> None:
    """Start a layer's heads off attending to the few tokens before each one.

    Binding a word to what governs it ("denies" to "gout") needs heads that look at neighbours. A pretrained
    model has them; from random weights they are what takes longest to appear, and within a short warm
    start they do not. Through the rotary embedding a constant in queries and keys is a function of distance
    alone, so biases can say "one, two or three tokens back" where training then goes on from. It
    is only a start: architecture and checkpoint stay plain Qwen3.
    """
    import torch

    fast = HEAD_DIM // 4  # of the HEAD_DIM / 2 frequencies, the half that tells neighbours apart
    frequencies = ROPE_THETA ** (-torch.arange(fast) / (HEAD_DIM // 2))
    key = torch.zeros(HEADS // 2, HEAD_DIM)
    key[:, :fast] = 3.0
    query = torch.zeros(HEADS, HEAD_DIM)
    for head, distance in enumerate((1, 1, 2, 3)):
        query[head, :fast] = 3.0 * torch.cos(-distance * frequencies)
        query[head, HEAD_DIM // 2 : HEAD_DIM // 2 + fast] = 3.0 * torch.sin(-distance * frequencies)
    with torch.no_grad():
        attention.k_proj.bias.copy_(key.flatten())
        attention.q_proj.bias.copy_(query.flatten())
        attention.q_norm.weight.fill_(2.0)


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
