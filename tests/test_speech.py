"""Speech models: the mask that they are given is over samples, and their layers see frames."""

import pytest
import torch
import transformers as hf
from peft import get_peft_model

import bara
from helpers import CONFIGS, stir

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
CLASSIFIER = (
    SIZE
    | CONVOLUTIONS
    | POSITIONS
    | {"num_labels": 3, "classifier_proj_size": 8, "feat_extract_norm": "layer"}
)
CALM = {"layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "mask_time_prob": 0.0}
CALM |= {"activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}


def wav2vec2():
    config = hf.Wav2Vec2Config(**CLASSIFIER, **CALM)
    return hf.Wav2Vec2ForSequenceClassification(config)


def with_its_adapter():
    """Behind its encoder two layers make four frames one."""
    config = hf.Wav2Vec2Config(
        **CLASSIFIER, **CALM, vocab_size=9, add_adapter=True, num_adapter_layers=2
    )
    return hf.Wav2Vec2ForCTC(config)


def hubert():
    config = hf.HubertConfig(**CLASSIFIER, **CALM)
    return hf.HubertForSequenceClassification(config)


def wavlm():
    config = hf.WavLMConfig(**CLASSIFIER, **CALM)
    return hf.WavLMForSequenceClassification(config)


SAMPLES = (195, 115)
"""48 and 28 frames, which convolutions with a stride of two share out without a rest."""


def sounds(length):
    """Two sounds with silence behind them."""
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.zeros(2, length), torch.zeros(2, length).long()
    for row, samples in enumerate(SAMPLES):
        values[row, :samples] = torch.randn(samples, generator=generator)
        mask[row, :samples] = 1
    return {"input_values": values, "attention_mask": mask}


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (wav2vec2, ["q_proj", "v_proj"]),
        (wav2vec2, ["projector"]),
        (with_its_adapter, ["q_proj"]),
        (with_its_adapter, ["lm_head"]),
        (hubert, ["q_proj", "v_proj"]),
        (wavlm, ["intermediate_dense"]),
    ],
)
def test_silence_behind_a_sound_counts_in_neither_rank_nor_kl(make, targets, granularity):
    """The layers' inputs have no noise in them: no other layer of the adapter is before them."""
    torch.manual_seed(0)
    base = make()
    config = CONFIGS["bara"](
        r=4, target_modules=targets, num_observations=4, warmup=0, granularity=granularity
    )
    model = stir(get_peft_model(base, config)).eval()

    def measured(inputs):
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        rank = bara.effective_rank(model, inputs).soft
        model.train()(**inputs)
        return logits, rank, bara.kl_terms(model)["kl_local"]

    padded = sounds(600)
    alone = [
        {name: value[row : row + 1, :samples] for name, value in padded.items()}
        for row, samples in enumerate(SAMPLES)
    ]
    logits, ranks, kls = zip(*(measured(one) for one in alone), strict=True)
    found = measured(padded)
    if found[0].dim() == 2:
        torch.testing.assert_close(found[0], torch.cat(logits), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], torch.cat(ranks, dim=1), atol=1e-5, rtol=1e-4)
    assert found[2] == pytest.approx(sum(kls) / 2, rel=1e-4)


def test_a_decoder_behind_a_speech_encoder():
    """Of two encoders: one that shortens the mask itself, one whose parts do it for it."""
    torch.manual_seed(0)
    text = {"vocab_size": 20, "decoder_layers": 1, "decoder_attention_heads": 2}
    options = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0}
    feed = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layerdrop": 0.0}
    small = {"num_conv_layers": 1, "conv_kernel_sizes": (3,), "conv_channels": 8}
    base = hf.Speech2TextForConditionalGeneration(
        hf.Speech2TextConfig(**text, **options, **feed, **small, input_feat_per_channel=5)
    )
    features, mask = torch.zeros(1, 40, 5), torch.zeros(1, 40).long()
    features[0, :21], mask[0, :21] = torch.randn(21, 5), 1
    _same_rank_with_and_without_padding(base, {"input_features": features}, mask, 21)

    torch.manual_seed(0)
    options = {"encoder_attention_heads": 2, "encoder_ffn_dim": 24, "encoder_layers": 1}
    text |= {"decoder_ffn_dim": 24, "hidden_size": 16, "initializer_range": 0.3}
    base = hf.SpeechT5ForSpeechToText(
        hf.SpeechT5Config(**text, **options, **CONVOLUTIONS, **POSITIONS, feat_extract_norm="layer")
    )
    values = sounds(600)
    values = {name: value[:1] for name, value in values.items()}
    mask = values.pop("attention_mask")
    # its convolution over positions sees what is behind the end of a sound
    _same_rank_with_and_without_padding(base, values, mask, SAMPLES[0], rtol=2e-3)


def _same_rank_with_and_without_padding(base, inputs, mask, length, rtol=1e-4):
    config = bara.BaraConfig(r=4, target_modules=["q_proj", "v_proj"], num_observations=4)
    model = stir(get_peft_model(base, config)).eval()
    labels = {"labels": torch.tensor([[3, 4, 5]])}
    padded = inputs | {"attention_mask": mask} | labels
    alone = {name: value[:, :length] for name, value in padded.items()}
    ranks = [bara.effective_rank(model, one).soft for one in (alone, padded)]
    torch.testing.assert_close(ranks[1], ranks[0], atol=1e-5, rtol=rtol)
