#include "token_ops_kernels.h"

namespace vitrail {

const TokenKernels kTokenPortable = kTokenKernels;

}  // namespace vitrail
