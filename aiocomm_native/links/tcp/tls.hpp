// TLS over a socket, by the OpenSSL that the machine has: loaded when first asked for, neither linked nor needed to build.
//
// Both sides show a certificate and accept only those signed by the configured authorities. Host names are not
// compared: who a peer is has been settled by the group's token before, and members of a group move.
#pragma once

#include <memory>
#include <string>

#include "links/tcp/stream.hpp"

namespace aiocomm::tcp {

struct TlsFiles {
  std::string certificate, key, authorities;  // PEM; without a key file it is in the certificate's
};

class TlsContext {
 public:
  virtual ~TlsContext() = default;
  virtual std::unique_ptr<Stream> wrap(UniqueFd fd, bool initiator) = 0;
  // Throws LinkFailure where the library is missing or a file cannot be used.
  static std::shared_ptr<TlsContext> load(const TlsFiles& files);
};

}  // namespace aiocomm::tcp
