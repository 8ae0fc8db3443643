"""`python -m tpresearch.import_hf init_from=FOLDER`: a Hugging Face model as a checkpoint at step 0.

Training needs no import: `init_from` reads the folder itself. This writes a checkpoint under the run's plan and mesh
(under torchrun, each rank writes what it holds) that other runs start from once the folder is gone.
"""

from __future__ import annotations

from pathlib import Path

from tpresearch.checkpoint.disk import folder_of, step_folders
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config, TokenizerKind
from tpresearch.config.world import World
from tpresearch.hf.files import is_own_run
from tpresearch.launch import Run, entrypoint
from tpresearch.launch.claim import free_name
from tpresearch.train.preflight import Preflight, preflight

NOTHING_YET = -1
"""The last step of a run without steps, so that step 0 is saved."""


def preflight_import(cfg: Config, world: World) -> Preflight:
    """The preflight of a training, for a folder or hub id in Hugging Face's format; also refuses our runs, which need no import."""
    if cfg.init_from and is_own_run(cfg.init_from):
        why, legal = "it already is a tpresearch run", "a folder or hub id in Hugging Face's format"
        raise ConfigError("init_from", cfg.init_from, why, legal)
    if cfg.plan_only:
        raise ConfigError("plan_only", True, "an import writes weights", "false; train.py shows the plan")
    return preflight(cfg, world)


def check_folder(job: Preflight, folder: Path, restarted: bool) -> None:
    """Refuse the folder of a run, whose checkpoints would be set aside, before anything in it is touched."""
    if (steps := step_folders(folder)) and steps[-1] != folder_of(folder, 0):
        why = f"a run has {steps[-1].name} there, which an import at step 0 would set aside"
        fix = {"hydra.run.dir": free_name(folder, "-")}
        raise ConfigError("hydra.run.dir", folder, why, "a folder of its own", fix=fix)


@entrypoint("import_hf", preflight=preflight_import, check_folder=check_folder)
def main(job: Preflight, run: Run) -> None:
    # Late: a refused config should not wait for all of torch.
    from tpresearch.checkpoint.collective import checkpoint_group
    from tpresearch.checkpoint.save import SaveFailed
    from tpresearch.data.pipeline import prepare
    from tpresearch.data.tokenizer import load_hf, save_tokenizer
    from tpresearch.parallel.group import process_group
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.track.record import write_config
    from tpresearch.train.assemble import assemble
    from tpresearch.train.saving import build_saver

    cfg, device = job.cfg, job.device
    assert device
    corpus = prepare(cfg.data, cfg.tokenizer)
    with process_group(device, run.world):
        loop = assemble(job, build_mesh(job.sizes, device.type), device, corpus)
        saver = build_saver(job, run, corpus, NOTHING_YET, checkpoint_group())
        try:
            saver.save(loop.state, 0, None, last=True)
        except SaveFailed as error:
            raise ConfigError("hydra.run.dir", run.folder, str(error), "a disk with room") from None
    if run.world.rank == 0:
        write_config(run.folder, as_dict(cfg))
        if cfg.tokenizer.kind is TokenizerKind.hf:
            save_tokenizer(load_hf(cfg.tokenizer.path), cfg.tokenizer, run.folder)
        print(f"{folder_of(run.folder, 0)}: {job.parameters:,} parameters of {cfg.init_from}")


if __name__ == "__main__":
    main()
