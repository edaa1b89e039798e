// Many tensors of any size become equal chunks of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace layerpipe {

struct alignas(16) Chunk {
    int64_t begin;  // elements of that tensor
    int32_t tensor, count;
};

inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& numels, int64_t chunk) {
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < numels.size(); ++i) {
        int64_t begin = 0;
        do {  // an empty tensor has a chunk, too: its steps are counted
            chunks.push_back(
                {begin, static_cast<int32_t>(i), static_cast<int32_t>(std::min(chunk, numels[i] - begin))});
        } while ((begin += chunk) < numels[i]);
    }
    return chunks;
}

}  // namespace layerpipe
