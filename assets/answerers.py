"""Who is asked: the one place where settings become an `Answerer`."""

from collections.abc import Mapping

from alignment.ai_feedback import JudgeSettings
from alignment.critic import Answerer, LocalAnswerer
from alignment.handles import Checkpoint
from alignment.models import LoadSettings
from resources.artifacts import ArtifactStore


def make_answerer(
    settings: JudgeSettings, checkpoints: Mapping[str, Checkpoint], store: ArtifactStore, load: LoadSettings
) -> Answerer:
    """The model that settings name, ready to be asked.

    Args:
        checkpoints: what a local model may be, by the asset's name.
        load: how a local model is loaded.
    """
    from alignment.models import load_causal_lm, load_tokenizer

    checkpoint = checkpoints[settings.model]
    files = store.model_files(checkpoint)
    identity = f"{checkpoint.asset}/{checkpoint.fingerprint[:12]}"
    model, tokenizer = load_causal_lm(files, load), load_tokenizer(files.base, load.trust_remote_code)
    return LocalAnswerer(model, tokenizer, identity=identity, batch_size=settings.batch_size)
