"""How much shared memory the compiler gives a tile, by the compiler's own allocation, without compiling to the end.

Triton lays out shared memory before it makes code of a kernel: its passes up to there take a tenth of a compilation.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from ..aot import Compiled, Job, signature
from ..kernels import KERNELS, compiler_options


class AllocationJob(Job):
    """Runs the compiler up to the allocation of shared memory: only `shared_bytes` and `error` are filled in."""

    def run(self) -> Compiled:
        blank = self.blank()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                shared = _allocated(self)
        except Exception as error:  # the compiler raises its own kinds of exception
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            return Compiled(**blank.__dict__ | {"error": f"{type(error).__name__}: {text}"})
        return Compiled(**blank.__dict__ | {"shared_bytes": shared})


def _allocated(job: Job) -> int:
    """Bytes of shared memory that a launch of the job would take."""
    from triton._C.libtriton import ir, passes
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    arch: str | int = job.target.arch
    nvidia = job.target.vendor == "nvidia"
    if nvidia:
        arch = job.target.capability
    source = ASTSource(KERNELS[job.kernel].function, *signature(job))
    target = GPUTarget("cuda" if nvidia else "hip", arch, job.target.warp_size)
    backend: Any = make_backend(target)
    options = backend.parse_options(compiler_options(job.tile.num_warps, job.tile.num_stages))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {}
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    manager = ir.pass_manager(context)
    # As at the beginning of the backends' `make_llir`.
    if nvidia:
        from triton._C.libtriton import nvidia as vendor
        from triton.backends.nvidia.compiler import get_ptx_version_from_options

        passes.ttgpuir.add_combine_tensor_select_and_if(manager)
        passes.ttgpuir.add_allocate_warp_groups(manager)
        passes.convert.add_scf_to_cf(manager)
        passes.gluon.add_inliner(manager)
        version = get_ptx_version_from_options(options, arch)
        vendor.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, version)
    else:
        from triton._C.libtriton import amd as vendor

        passes.convert.add_scf_to_cf(manager)
        passes.gluon.add_inliner(manager)
        vendor.passes.ttgpuir.add_allocate_shared_memory(manager)
    manager.run(module, "allocate shared memory")
    return int(module.get_int_attr("ttg.shared"))
