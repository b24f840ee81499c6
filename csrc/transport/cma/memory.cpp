// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A region of the peer as a list of addresses in its process, and how it is pulled from.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "common/error.hpp"
#include "transport/cma/peer.hpp"

namespace kvxfer::cma {
namespace {

constexpr size_t kNumWords = 3;  // incarnation, region, lease
constexpr size_t kMaxBlocks = kMaxElements - kNumWords;
constexpr size_t kMaxPieces = 1000;  // of a region: a block across all of them still fits a call

struct RemotePiece {
  uint64_t address = 0, nbytes = 0;
};

class CmaMemory final : public shm::PeerMemory {
 public:
  CmaMemory(uint64_t nbytes, const std::vector<RemotePiece>& pieces, std::shared_ptr<Peer> peer)
      : PeerMemory(nbytes), peer_(std::move(peer)) {
    uint64_t offset = 0;
    for (const RemotePiece& piece : pieces) {
      pieces_.push_back({reinterpret_cast<std::byte*>(piece.address), offset, piece.nbytes});
      offset += piece.nbytes;
    }
  }
  shm::ChunkLimit limit() const noexcept override { return {kMaxCallBytes, kMaxBlocks}; }

  std::optional<Failure> pull(std::span<const shm::Pull> pulls,
                              const shm::Watch& watch) noexcept override {
    size_t begin = 0, end = 0, num_remote = 0;
    for (; end < pulls.size(); ++end) {
      const shm::Pull& each = pulls[end];
      // Blocks rarely lie across pieces; where one does, it takes more remote elements than local.
      const size_t needs = for_each(each, [](std::byte*, size_t) {});
      if (num_remote + needs > kMaxBlocks) {
        if (auto failure = call(pulls.subspan(begin, end - begin), watch)) return failure;
        begin = end;
        num_remote = 0;
      }
      num_remote += needs;
    }
    return call(pulls.subspan(begin, end - begin), watch);
  }

 private:
  template <typename Emit>
  size_t for_each(const shm::Pull& pull, Emit&& emit) const noexcept {
    size_t count = 0;
    resolve_pieces(pieces_, pull.from, pull.nbytes, [&](std::byte* address, size_t size) {
      emit(address, size);
      ++count;
    });
    return count;
  }

  std::optional<Failure> call(std::span<const shm::Pull> pulls, const shm::Watch& watch) noexcept {
    std::array<iovec, kMaxBlocks> local, remote;
    size_t num_local = 0, num_remote = 0;
    for (const shm::Pull& each : pulls) {
      local[num_local++] = {each.to, each.nbytes};
      for_each(each,
               [&](std::byte* address, size_t size) { remote[num_remote++] = {address, size}; });
    }
    size_t done = 0;
    std::optional<Failure> failure =
        peer_->read({local.data(), num_local}, {remote.data(), num_remote}, watch, done);
    if (!failure || failure->err == 0) return failure;
    const size_t came = done;
    for (const shm::Pull& each : pulls) {
      failure->span = each.span;
      if (done < each.nbytes) break;
      done -= each.nbytes;
    }
    failure->text += cat(" (", came, " bytes of this batch had come)");
    return failure;
  }

  const std::shared_ptr<Peer> peer_;
  std::vector<Piece> pieces_;
};

class CmaReach final : public shm::Reach {
 public:
  explicit CmaReach(std::shared_ptr<Peer> peer) : peer_(std::move(peer)) {}
  std::string_view transport() const noexcept override { return "cma"; }
  std::string describe() const override { return "memory is read by process_vm_readv"; }
  bool can_show(const Region& region) const noexcept override {
    return region.shareable && region.pieces.size() <= kMaxPieces;
  }
  Bytes show(const Region& region, int&) const override {
    Bytes bytes;
    Writer writer(bytes);
    for (const Piece& piece : region.pieces)
      writer.put(RemotePiece{reinterpret_cast<uint64_t>(piece.base), piece.nbytes});
    return bytes;
  }
  Bytes show(const ExportedWords& words, int&) const override {
    Bytes bytes;
    Writer(bytes).u64(reinterpret_cast<uint64_t>(words.base()));
    return bytes;
  }
  std::shared_ptr<shm::PeerMemory> take(uint64_t nbytes, ByteView shown, Fd fd,
                                        std::string& reason) override {
    Reader reader(shown);
    std::vector<RemotePiece> pieces;
    uint64_t left = nbytes;
    while (reader.remaining() > 0 && pieces.size() < kMaxPieces) {
      const auto piece = reader.get<RemotePiece>();
      if (piece.nbytes == 0 || piece.nbytes > left || piece.address == 0 ||
          piece.address > ~uint64_t{0} - piece.nbytes)
        break;
      left -= piece.nbytes;
      pieces.push_back(piece);
    }
    if (fd || !reader.finished() || left != 0 || pieces.empty())
      return reason = "a region's pieces that do not add up", nullptr;
    return std::make_shared<CmaMemory>(nbytes, pieces, peer_);
  }
  bool take_words(ByteView shown, Fd fd, std::string& reason) override {
    Reader reader(shown);
    const uint64_t address = reader.u64();
    if (fd || !reader.finished() || !peer_->set_words(address))
      return reason = "words shown wrongly", false;
    return true;
  }

 private:
  const std::shared_ptr<Peer> peer_;
};

}  // namespace

std::unique_ptr<shm::Reach> make_reach(std::shared_ptr<Peer> peer) {
  return std::make_unique<CmaReach>(std::move(peer));
}

}  // namespace kvxfer::cma
