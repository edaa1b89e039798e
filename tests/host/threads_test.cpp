// The chunks of a call are each done once, and a thread that comes late touches nothing of it: under sanitizers.
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/launch.cpp"

namespace layerpipe {
extern const InstructionSet instruction_set_baseline{};
#if defined(LP_X86)
extern const InstructionSet instruction_set_avx2{}, instruction_set_avx512{};
#endif
}  // namespace layerpipe

int main() {
    long wrong = 0;
    for (int round = 0; round < 2000; ++round) {
        std::vector<int> done(37, 0);
        {
            const auto once = std::make_unique<int>(1);  // freed when the call is over
            layerpipe::parallel_chunks(done.size(), int64_t{1} << 30, 4, [&](size_t i) { done[i] += *once; });
        }
        for (int count : done) wrong += count != 1;
    }
    std::printf("%ld wrong\n", wrong);
    return wrong != 0;
}
