# Three packages: the daemon with its command line tool, the client library, and what building
# against it needs. The library is apart because its users are not the daemon's host.
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_DIRECTORY ${PROJECT_BINARY_DIR}/packages)
set(CPACK_PACKAGE_CONTACT "${EINSUMD_MAINTAINER}")
set(CPACK_SET_DESTDIR ON) # /etc is not under the prefix
set(CPACK_STRIP_FILES ON)
set(CPACK_COMPONENTS_ALL daemon library development)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(version ${PROJECT_VERSION}-${CPACK_DEBIAN_PACKAGE_RELEASE})

set(CPACK_DEBIAN_DAEMON_PACKAGE_NAME einsumd)
set(CPACK_DEBIAN_DAEMON_PACKAGE_SECTION net)
set(CPACK_DEBIAN_DAEMON_PACKAGE_DEPENDS
  "procps, systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles, init-system-helpers (>= 1.54~)")
set(CPACK_DEBIAN_DAEMON_PACKAGE_SUGGESTS "libcuda1, bash-completion")
set(CPACK_DEBIAN_DAEMON_DESCRIPTION
"resident FP8 attention output projections over gRPC
Keeps the attention output projections of DeepSeek-V4 resident and answers
their FP8 einsum, bhr,hdr->bhd, over gRPC, on the CPU or an NVIDIA GPU.
.
This package has the daemon, its systemd unit, and einsumctl, which asks,
checks and measures it.")
set(CPACK_DEBIAN_DAEMON_PACKAGE_CONTROL_EXTRA
  ${CMAKE_CURRENT_LIST_DIR}/conffiles ${CMAKE_CURRENT_LIST_DIR}/postinst
  ${CMAKE_CURRENT_LIST_DIR}/prerm ${CMAKE_CURRENT_LIST_DIR}/postrm)

# Named after the SONAME, as Debian's policy has it.
get_target_property(soversion einsum_client_shared SOVERSION)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME libeinsum-client${soversion})
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_EXTRA ${CMAKE_CURRENT_LIST_DIR}/triggers)
set(CPACK_DEBIAN_LIBRARY_DESCRIPTION
"C library for callers of einsumd
Projections over the weights that an einsumd keeps resident: blocking,
asynchronous or streamed, over gRPC or shared memory.")

set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libeinsum-client-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS
  "${CPACK_DEBIAN_LIBRARY_PACKAGE_NAME} (= ${version})")
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_RECOMMENDS "libgrpc-dev, libprotobuf-c-dev, libisal-dev") # of the archive
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION
"C library for callers of einsumd, to build with
Header, static library, and files for pkg-config and CMake.")

# Debian wants both in every package; elsewhere they are nobody's.
configure_file(${CMAKE_CURRENT_LIST_DIR}/changelog.in changelog @ONLY)
execute_process(COMMAND ${GZIP} -9nfk ${CMAKE_CURRENT_BINARY_DIR}/changelog COMMAND_ERROR_IS_FATAL ANY)
foreach(component ${CPACK_COMPONENTS_ALL})
  string(TOUPPER ${component} upper)
  set(doc ${CMAKE_INSTALL_DATADIR}/doc/${CPACK_DEBIAN_${upper}_PACKAGE_NAME})
  install(FILES ${CMAKE_CURRENT_LIST_DIR}/copyright DESTINATION ${doc}
    COMPONENT ${component} EXCLUDE_FROM_ALL)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/changelog.gz
    DESTINATION ${doc} RENAME changelog.Debian.gz COMPONENT ${component} EXCLUDE_FROM_ALL)
endforeach()

include(CPack)
