// Memory that a thread keeps for itself between calls, aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    // At least so many bytes; what stood there before is lost.
    void* bytes(std::size_t wanted) {
        if (wanted > size_) {
            std::free(memory_);
            size_ = (wanted + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, size_);
            if (!memory_) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return memory_;
    }

private:
    void* memory_ = nullptr;
    std::size_t size_ = 0;
};
