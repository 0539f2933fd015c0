// A growing buffer that a thread reuses between calls, aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

class ScratchBuffer {
public:
    ~ScratchBuffer() { std::free(memory_); }

    // Returns at least `num_bytes` bytes; growing discards the contents.
    void* reserve(std::size_t num_bytes) {
        if (num_bytes > capacity_) {
            std::free(memory_);
            capacity_ = (num_bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, capacity_);
            if (!memory_) {
                capacity_ = 0;
                throw std::bad_alloc();
            }
        }
        return memory_;
    }

private:
    void* memory_ = nullptr;
    std::size_t capacity_ = 0;
};
