# before a benchmark imports Megatron itself: it hides what needs a CUDA device where there is none
import megatron_occ.mcore  # noqa: F401
