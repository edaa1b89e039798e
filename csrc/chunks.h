// Many tensors of any size become equal chunks of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace layerpipe {

constexpr int64_t kChunk = 1 << 15;

struct Chunk {
    int32_t tensor;
    int64_t begin, end;  // elements of that tensor
};

inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& numels) {
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < numels.size(); ++i)
        for (int64_t begin = 0; begin < numels[i]; begin += kChunk)
            chunks.push_back({static_cast<int32_t>(i), begin, std::min(begin + kChunk, numels[i])});
    return chunks;
}

}  // namespace layerpipe
