# An image of einsumd, from stock Debian:
#
#     docker build -t einsumd .                         with the CPU engine
#     docker build -t einsumd --build-arg CUDA=ON .     also with the GPU's
#     docker run --rm --gpus all -p 50061:50061 -v /srv/models:/models:ro --read-only einsumd
#
# It serves what /etc/einsumd/einsumd.json says: mount one, or load weights from /models by
# `einsumctl weights load`. SIGTERM drains; give it drain_grace_ms (docker stop --time).

FROM debian:bookworm AS build
ARG CUDA=OFF
WORKDIR /source
COPY deploy/install-dependencies.sh deploy/
RUN deploy/install-dependencies.sh \
    && apt-get -qq install -y --no-install-recommends dpkg-dev file
COPY deploy/container/install-cuda.sh deploy/container/
RUN [ "$CUDA" = OFF ] || deploy/container/install-cuda.sh
COPY . .
# The package has the stripped programs, and names the libraries that they need.
RUN PATH="$PATH:/usr/local/cuda/bin" cmake --preset package -DEINSUMD_CUDA="$CUDA" \
    && cmake --build build/package --target package \
    && dpkg-deb --extract build/package/packages/einsumd_*.deb /package \
    && dpkg-deb --field build/package/packages/einsumd_*.deb Depends \
        | tr ',' '\n' | awk '/^ *(lib|zlib)/ { print $1 }' > /package/libraries

FROM debian:bookworm-slim
COPY --from=build /package/libraries /tmp/
RUN apt-get -qq update \
    && xargs apt-get -qq install -y --no-install-recommends < /tmp/libraries > /dev/null \
    && rm -rf /tmp/libraries /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 10061 einsumd \
    && useradd --uid 10061 --gid einsumd --no-create-home --home-dir / einsumd \
    && install -d -o einsumd -g einsumd /run/einsumd && install -d /models
COPY --from=build /package/usr/sbin/einsumd /usr/sbin/
COPY --from=build /package/usr/bin/einsumctl /usr/bin/
COPY --from=build /package/usr/share/doc/einsumd/copyright /usr/share/doc/einsumd/
COPY deploy/container/einsumd.json /etc/einsumd/
# What is inside, for whoever scans images.
RUN { printf 'einsumd\t%s\t\n' "$(einsumd --version | cut -d' ' -f2)"; \
      dpkg-query --show --showformat '${Package}\t${Version}\t${Architecture}\n'; } \
    > /usr/share/doc/einsumd/packages.tsv

# For NVIDIA's container runtime: which parts of the driver come in with --gpus.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10061:10061
EXPOSE 50061
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["einsumctl", "--timeout", "2000", "health"]
ENTRYPOINT ["/usr/sbin/einsumd"]
CMD ["--config", "/etc/einsumd/einsumd.json"]
